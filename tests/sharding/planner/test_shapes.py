"""The formula's table of weights is the model's own."""

import jax
import pytest

from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import abstract_params, logical_axes
from qwen2_jax.sizes import PUBLISHED
from sharding.planner.shapes import count, count_active, weights

PARAMETERS = {
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
}
MIXED = Qwen2Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    decoder_sparse_step=2,
    qkv_bias=False,
)


def test_parameters_are_those_of_the_published_models():
    assert {name: count(PUBLISHED[name]) for name in PARAMETERS} == PARAMETERS


def test_active_parameters_of_the_mixtures():
    assert count_active(PUBLISHED["qwen2-57b-a14b"]) == 14_249_270_784
    assert count_active(PUBLISHED["qwen1.5-moe-a2.7b"]) == 2_689_173_504
    assert count_active(PUBLISHED["qwen2-7b"]) == PARAMETERS["qwen2-7b"]


@pytest.mark.parametrize("config", [*{id(c): c for c in PUBLISHED.values()}.values(), MIXED], ids=str)
def test_weights_are_those_of_the_stacked_tree(config):
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config, stacked=True))
    names = jax.tree.leaves(logical_axes(config, stacked=True), is_leaf=lambda leaf: isinstance(leaf, tuple))
    model = {
        jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, axes)
        for (path, leaf), axes in zip(flat, names, strict=True)
    }
    table = {
        weight.path: ((weight.layers, *weight.shape), ("layers", *weight.axes))
        if weight.layers
        else (weight.shape, weight.axes)
        for weight in weights(config)
    }
    assert table == model
