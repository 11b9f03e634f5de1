"""Parameters are split as the rules say, and give the same logits."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.model import init_params
from sharding import param_shardings, partition_spec

CONFIG = Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=32,
)


def make_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize("stacked", [False, True])
def test_specs(stacked):
    shardings = param_shardings(CONFIG, make_mesh(fsdp=2, tensor=2, expert=2), stacked)
    layer = shardings["layers"]["block_0"] if stacked else shardings["layers_1"]
    lead = (None,) if stacked else ()
    assert shardings["embed"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert layer["attn"]["q"]["kernel"].spec == PartitionSpec(*lead, "tensor", None, "fsdp")
    assert layer["attn"]["k"]["bias"].spec == PartitionSpec(*lead, "tensor", None)
    assert layer["moe"]["experts"]["down"].spec == PartitionSpec(*lead, "expert", "fsdp", "tensor")
    assert layer["moe"]["router"]["kernel"].spec == PartitionSpec(*lead, None, "fsdp")


def test_sharded_logits_equal_unsharded():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    run = jax.jit(lambda params: Qwen2(CONFIG).apply({"params": params}, tokens).logits)
    sharded = jax.device_put(params, param_shardings(CONFIG, make_mesh(fsdp=2, tensor=2, expert=2)))
    np.testing.assert_allclose(run(sharded), run(params), atol=1e-5)


@pytest.mark.parametrize("function", [param_shardings, lambda config, mesh: partition_spec(("embed",), {}, mesh)])
def test_axes_that_no_rule_knows(function):
    with pytest.raises(ValueError, match="axes 'model', 'dp'; known ones are data, fsdp, tensor, expert, context"):
        function(CONFIG, make_mesh(model=2, fsdp=2, dp=1))


def test_explicit_axes():
    """What the message says to do works."""
    with pytest.raises(ValueError, match="axes fsdp, tensor of the mesh are Explicit") as caught:
        param_shardings(CONFIG, jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2))
    advice = str(caught.value).partition("make it with ")[2]
    mesh = eval(advice, {"jax": jax, "shape": (2, 2), "names": ("fsdp", "tensor")})
    assert jax.tree.leaves(param_shardings(CONFIG, mesh))


def test_the_mesh_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "make_mesh" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    param_shardings(CONFIG, names["mesh"])


def test_indivisible_dims_are_named():
    with pytest.raises(ValueError, match=r"layers_0\.attn\.k\.bias: kv_heads \(2\) over tensor \(4\).*and \d+ more"):
        param_shardings(CONFIG, make_mesh(tensor=4, fsdp=2))
