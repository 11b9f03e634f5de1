"""Every model on every mesh equals the model on one device, in logits, losses and all gradients."""

import jax
import pytest
from jax.sharding import NamedSharding

from sharding import batch_sharding, make_mesh, param_shardings, run_options
from sharding.rules import activation_spec
from tests.sharding.models import MODELS, assert_equal_to_one_device, batch, loss_and_gradients, parameters

MESHES = [
    "data=8",
    "fsdp=8",
    "tensor=8",
    "context=8",
    "data=2,fsdp=4",
    "fsdp=4,tensor=2",
    "data=4,context=2",
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,context=2,tensor=2",
    "data=2,tensor=4",
    "fsdp=2,context=4",
    "context=2,tensor=4",
]
EXPERT_MESHES = ["expert=8", "data=2,expert=4", "fsdp=2,expert=2,tensor=2", "expert=2,context=4", "expert=4,tensor=2"]

CASES = [(name, mesh) for name in MODELS for mesh in MESHES]
CASES += [(name, mesh) for name in MODELS if MODELS[name].is_moe for mesh in EXPERT_MESHES]
# Each case compiles for seconds, and what attention and experts do on a mesh does not depend on the other. The fast
# tests have plain dense models on every mesh, the others where each axis is there, and where experts are spread.
FAST = {("dense", mesh) for mesh in MESHES} | {("moe", mesh) for mesh in EXPERT_MESHES}
FAST |= {(name, mesh) for name in MODELS for mesh in ("tensor=8", "context=8", "fsdp=2,context=2,tensor=2")}
FAST -= {("moe, dual-chunk", mesh) for mesh in MESHES}
FAST |= {("moe, dual-chunk", "expert=2,context=4")}


@pytest.mark.parametrize(
    ("name", "spec"), [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES]
)
def test_equals_one_device(name, spec):
    config, mesh = MODELS[name], make_mesh(spec)
    shardings = param_shardings(config, mesh, stacked=True)
    tokens, segments = (jax.device_put(x, batch_sharding(mesh, x.shape)) for x in batch())
    params = jax.device_put(parameters(config), shardings)
    remat = "full" if "fsdp" in spec else "none"
    result = loss_and_gradients(params, tokens, segments, config, run_options(config, mesh), remat)
    assert_equal_to_one_device(config, result)
    (_, (logits, _)), gradients = result
    placed = activation_spec(("batch", "length", "vocab"), logits.shape, mesh)
    assert logits.sharding.is_equivalent_to(NamedSharding(mesh, placed), logits.ndim)
    for gradient, sharding in zip(jax.tree.leaves(gradients), jax.tree.leaves(shardings), strict=True):
        assert gradient.sharding.is_equivalent_to(sharding, gradient.ndim)
