"""Every model on every mesh equals the model on one device, and everything is split as the tables say."""

import jax
import numpy as np
import optax
import pytest

from qwen2_jax.cache import empty_cache
from qwen2_jax.model import forward
from sharding import batch_sharding, cache_shardings, make_mesh, optimizer_shardings, param_shardings, run_options
from tests.sharding.models import (
    LENGTH,
    MODELS,
    ROWS,
    assert_equal_to_one_device,
    batch,
    loss_and_gradients,
    parameters,
)
from tests.sharding.specs import ACTIVATIONS, CACHE, LOGITS, TOKENS, Watched, assert_split, assert_weights

MESHES = [spec for spec in ACTIVATIONS if "expert" not in spec]
EXPERT_MESHES = [spec for spec in ACTIVATIONS if "expert" in spec]

CASES = [(name, mesh) for name in MODELS for mesh in MESHES]
CASES += [(name, mesh) for name in MODELS if MODELS[name].is_moe for mesh in EXPERT_MESHES]
# Each case compiles for seconds, and what attention and experts do on a mesh does not depend on the other. The fast
# tests have dense models on every mesh, dual-chunk attention where each axis is there, experts where they are spread.
FAST = {("dense", mesh) for mesh in MESHES} | {("moe", mesh) for mesh in EXPERT_MESHES}
FAST |= {("dense, dual-chunk", mesh) for mesh in ("tensor=8", "context=8", "fsdp=2,context=2,tensor=2")}


@pytest.mark.parametrize(
    ("name", "spec"), [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES]
)
def test_equals_one_device(name, spec):
    config, mesh = MODELS[name], make_mesh(spec)
    shardings = param_shardings(config, mesh, stacked=True)
    tokens, segments = (jax.device_put(x, batch_sharding(mesh, x.shape)) for x in batch())
    params = jax.device_put(parameters(config), shardings)
    remat = "full" if "fsdp" in spec else "none"
    options = run_options(config, mesh)
    placement = Watched(mesh, options.placement.rules)
    options = options._replace(placement=placement)
    result = loss_and_gradients(params, tokens, segments, config, options, remat)
    assert_equal_to_one_device(config, result)
    placement.assert_activations(spec)
    (_, (logits, _)), gradients = result
    assert_split(logits.sharding, ACTIVATIONS[spec][LOGITS], mesh, "logits")
    assert_split(tokens.sharding, ACTIVATIONS[spec][TOKENS], mesh, "tokens")
    for tree in (params, gradients):
        assert_weights(jax.tree.map(lambda array: array.sharding, tree), spec, mesh)


@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_optimizer_state_is_split_as_its_parameters(spec):
    config, mesh = MODELS["moe" if "expert" in spec else "dense"], make_mesh(spec)
    adam = optimizer_shardings(optax.adamw(1e-3), parameters(config), param_shardings(config, mesh, stacked=True))[0]
    for moments in (adam.mu, adam.nu):
        assert_weights(moments, spec, mesh)


@pytest.mark.parametrize("spec", [*MESHES, *(pytest.param(spec, marks=pytest.mark.slow) for spec in EXPERT_MESHES)])
def test_a_step_of_decoding_leaves_the_cache_split(spec):
    config, mesh = MODELS["moe" if "expert" in spec else "dense"], make_mesh(spec)
    options = run_options(config, mesh, rules="serve")
    abstract = jax.eval_shape(lambda: empty_cache(config, ROWS, LENGTH, "float32", stacked=True, layout=options.heads))
    given = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        (parameters(config), abstract),
        (param_shardings(config, mesh, stacked=True), cache_shardings(mesh, abstract)),
    )

    @jax.jit
    def step(params, cache, token):
        out = forward(config, params, token, options=options, cache=cache)
        return out.cache.layers

    compiled = step.lower(*given, np.zeros((ROWS, 1), np.int32)).compile()
    layers = jax.tree.leaves(compiled.output_shardings)
    assert len(layers) == 2
    for found in layers:
        assert_split(found, (None, *ACTIVATIONS[spec][CACHE]), mesh, "cache")
