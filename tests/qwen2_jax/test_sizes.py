"""Every published size has exactly the published number of parameters."""

import math

import jax
import pytest

from qwen2_jax.model import abstract_params
from qwen2_jax.sizes import PUBLISHED, published

COUNTS = {
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("stacked", [False, True])
def test_parameter_count(name, stacked):
    shapes = jax.tree.leaves(abstract_params(PUBLISHED[name], stacked=stacked))
    assert sum(math.prod(shape.shape) for shape in shapes) == COUNTS[name]


def test_active_parameters_of_the_mixture():
    config = PUBLISHED["qwen2-57b-a14b"]
    idle = config.num_experts - config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert COUNTS["qwen2-57b-a14b"] - config.num_hidden_layers * idle * expert == 14_249_270_784


def test_instruct_variants_keep_the_shape():
    for name, config in PUBLISHED.items():
        base = PUBLISHED.get(name.removesuffix("-instruct"))
        assert base is not None
        assert (base.hidden_size, base.num_hidden_layers) == (config.hidden_size, config.num_hidden_layers)
    assert (published("Qwen2-72B").rms_norm_eps, published("qwen2-72b-instruct").rms_norm_eps) == (1e-5, 1e-6)


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown model 'qwen2-8b'; known are qwen2-0.5b, "):
        published("qwen2-8b")
