"""What is split over which axis: parameters, optimizer state, batches, activations and caches."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.cache import empty_cache
from qwen2_jax.model import abstract_params, init_params
from sharding import batch_sharding, cache_shardings, optimizer_shardings, param_shardings
from sharding.logical import RULES
from sharding.rules import activation_spec

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
    assert layer["attn_norm"]["scale"].spec == PartitionSpec(*lead, None)


def test_heads_that_do_not_divide_are_split_along_their_width():
    attn = param_shardings(CONFIG, make_mesh(tensor=4, fsdp=2))["layers_0"]["attn"]
    assert attn["q"]["kernel"].spec == PartitionSpec("tensor", None, "fsdp")
    assert attn["k"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert attn["v"]["bias"].spec == PartitionSpec(None, "tensor")


def test_optimizer_state_goes_with_its_parameters():
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    shardings = param_shardings(CONFIG, mesh, stacked=True)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    adam = optimizer_shardings(optimizer, abstract_params(CONFIG, stacked=True), shardings)[1][0]
    assert adam.mu == shardings and adam.nu == shardings
    assert adam.count.spec == PartitionSpec()


def test_batches_activations_and_caches():
    mesh = make_mesh(data=2, context=2, tensor=2)
    assert batch_sharding(mesh, (4, 16)).spec == PartitionSpec("data", "context")
    assert batch_sharding(mesh, (3, 15)).spec == PartitionSpec(None, None)  # nothing divides
    between_layers = ("batch", "residual", "embed")
    assert activation_spec(between_layers, (4, 16, 32), mesh).index(("context", "tensor")) == 1
    assert activation_spec(between_layers, (4, 16, 32), mesh, RULES["serve"])[1] == "context"
    assert activation_spec(between_layers, (4, 2, 32), mesh)[1] == "context"  # as many axes as divide
    for stacked, lead in ((False, ()), (True, (None,))):
        cache = jax.eval_shape(lambda stacked=stacked: empty_cache(CONFIG, 4, 16, stacked=stacked))
        placed = cache_shardings(mesh, cache)
        assert placed.layers[0][0].spec == PartitionSpec(*lead, "data", "tensor", "context", None)
        assert placed.segment_ids.spec == PartitionSpec("data", "context")
        assert placed.length.spec == PartitionSpec()


def test_sharded_logits_equal_unsharded():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    run = jax.jit(lambda params: Qwen2(CONFIG).apply({"params": params}, tokens).logits)
    sharded = jax.device_put(params, param_shardings(CONFIG, make_mesh(fsdp=2, tensor=2, expert=2)))
    np.testing.assert_allclose(run(sharded), run(params), atol=1e-5)


@pytest.mark.parametrize("function", [param_shardings, lambda config, mesh: batch_sharding(mesh, (8, 8))])
def test_axes_that_no_rule_knows(function):
    with pytest.raises(ValueError, match="axes 'model', 'dp'; known ones are data, fsdp, expert, context, tensor"):
        function(CONFIG, make_mesh(model=2, fsdp=2, dp=1))


def test_text_is_no_mesh():
    with pytest.raises(ValueError, match="must be a jax.sharding.Mesh, got 'fsdp=8'; sharding.make_mesh makes one"):
        param_shardings(CONFIG, "fsdp=8")


def test_explicit_axes():
    """What the message says to do works."""
    with pytest.raises(ValueError, match="axes fsdp, tensor of the mesh are Explicit") as caught:
        param_shardings(CONFIG, jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2))
    advice = str(caught.value).partition("make it with ")[2]
    mesh = eval(advice, {"jax": jax, "shape": (2, 2), "names": ("fsdp", "tensor")})
    assert jax.tree.leaves(param_shardings(CONFIG, mesh))


@pytest.mark.parametrize("page", ["checkpoints.md", "sharding.md"])
def test_programs_of_the_documentation(page, monkeypatch):
    dense = dataclasses.replace(CONFIG, num_experts=0)
    monkeypatch.setattr("qwen2_jax.sizes.published", lambda name: dense)
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "make_mesh" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    param_shardings(CONFIG, names["mesh"])


def test_indivisible_dims_are_named():
    odd = dataclasses.replace(CONFIG, moe_intermediate_size=18)
    with pytest.raises(ValueError, match="moe_intermediate_size 18 does not divide over tensor=4; use tensor=2"):
        param_shardings(odd, make_mesh(tensor=4, fsdp=2))
