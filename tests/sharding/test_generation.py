"""Generation on meshes: the same tokens as on one device, with the cache split."""

import re

import jax
import numpy as np
import pytest

from qwen2_jax import Generation, generate
from qwen2_jax.cache import empty_cache
from qwen2_jax.generation import Prefixes
from qwen2_jax.model import forward, unstack_layers
from sharding import cache_shardings, make_mesh, param_shardings, run_options
from tests.sharding.models import MODELS, batch, parameters

LENGTHS = np.array([32, 25, 9, 1])


@pytest.mark.parametrize(
    ("name", "spec", "chunk"),
    [
        ("dense", "data=2,fsdp=2,tensor=2", None),
        ("dense, dual-chunk", "tensor=8", None),
        ("dense, dual-chunk", "context=2,tensor=4", 8),
        ("moe", "expert=8", None),
        ("moe", "expert=4,context=2", None),
        ("moe, dual-chunk", "data=2,expert=2,tensor=2", 8),
    ],
)
def test_same_tokens(name, spec, chunk):
    config, mesh = MODELS[name], make_mesh(spec)
    params = unstack_layers(parameters(config), config)
    prompts = batch()[0][: len(LENGTHS)]
    alone = generate(config, params, prompts, LENGTHS, max_new_tokens=12)
    spread = jax.device_put(params, param_shardings(config, mesh))
    options = run_options(config, mesh, rules="serve")
    together = generate(config, spread, prompts, LENGTHS, max_new_tokens=12, options=options, prefill_chunk=chunk)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("dense, dual-chunk", "data=2,context=2,tensor=2"),
        ("moe", "data=2,expert=4"),
        pytest.param("dense", "fsdp=4,tensor=2", marks=pytest.mark.slow),
        pytest.param("moe, dual-chunk", "data=2,expert=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_same_tokens_after_a_shared_beginning(name, spec):
    config, mesh = MODELS[name], make_mesh(spec)
    params = unstack_layers(parameters(config), config)
    beginnings, rest = batch()[0][:2], batch(1)[0][: len(LENGTHS), :16]
    shared, lengths, of = np.array([32, 13]), np.array([16, 7, 9, 1]), np.array([0, 1, 1, 0])
    whole = shared[of] + lengths
    prompts = np.zeros((len(LENGTHS), 48), np.int32)
    for row in range(len(LENGTHS)):
        prompts[row, : whole[row]] = [*beginnings[of[row], : shared[of[row]]], *rest[row, : lengths[row]]]
    alone = generate(config, params, prompts, whole, max_new_tokens=12)
    spread = jax.device_put(params, param_shardings(config, mesh))
    options = run_options(config, mesh, rules="serve")
    prefixes = Prefixes(beginnings, shared, of)
    run = Generation(config, spread, rest, lengths, max_new_tokens=12, prefixes=prefixes, options=options)
    np.testing.assert_array_equal(run.advance(), alone)


def test_decoding_moves_no_cache():
    """A step of decoding leaves the split cache where it is."""
    config, mesh = MODELS["dense"], make_mesh("data=2,context=2,tensor=2")
    options = run_options(config, mesh, rules="serve")._replace(attention=None)
    params = unstack_layers(parameters(config), config)
    params = jax.device_put(params, param_shardings(config, mesh))
    cache = empty_cache(config, 4, 64, "float32", layout=options.heads)
    shardings = cache_shardings(mesh, cache)

    @jax.jit
    def step(params, token, cache):
        out = forward(config, params, token, options=options, cache=cache)
        return out.cache, out.logits

    compiled = step.lower(params, np.zeros((4, 1), np.int32), jax.device_put(cache, shardings)).compile()
    after = compiled.output_shardings[0]
    for ours, wanted in zip(jax.tree.leaves(after.layers), jax.tree.leaves(shardings.layers), strict=True):
        assert ours.is_equivalent_to(wanted, 4)
    slots_of_a_device, width = 32, config.head_dim
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", compiled.as_text())
    assert not [shape for shape in gathered if shape.endswith(f"{2 * slots_of_a_device},{width}")]
