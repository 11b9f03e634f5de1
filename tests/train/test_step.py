"""One step is AdamW on the gradients of the loss, on one device and on a mesh, and training works."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax import Qwen2
from qwen2_jax.remat import REMAT_POLICIES
from sharding import batch_sharding, make_mesh, run_options
from tests.sharding.models import DENSE, MOE, batch, parameters
from train import next_token_loss, next_token_targets
from train.objective import Step
from train.optimizer import adamw
from train.pretraining import Batch, Pretraining
from train.step import (
    TrainState,
    abstract_state,
    init_state,
    loss_and_gradients,
    make_train_step,
    new_state,
    state_shardings,
)

CONFIGS = {"dense": DENSE, "moe": MOE, "tied": dataclasses.replace(DENSE, tie_word_embeddings=True)}
OPTIMIZER = adamw(1e-2, clip_norm=0.5)
Z_LOSS = 0.01
POISON = 63
"""A token that `Poisoned` makes the loss NaN for, if it comes first."""


@dataclasses.dataclass(frozen=True)
class Poisoned(Pretraining):
    z_loss: float = Z_LOSS

    def __call__(self, config, params, batch, how, weight):
        share, sums = super().__call__(config, params, batch, how, weight)
        return share * jnp.where(batch.tokens[0, 0] == POISON, jnp.nan, 1.0), sums


def first_state(config) -> TrainState:
    return new_state(OPTIMIZER, jax.tree.map(jnp.copy, parameters(config)))  # a step uses its state up


def packed() -> Batch:
    tokens, segments = map(jnp.asarray, batch())
    return Batch(tokens, next_token_targets(tokens, segments), segments)


@functools.cache
def one_device(config):
    return make_train_step(config, OPTIMIZER, Step(dtype=jnp.float32, chunk=40), Poisoned())


@functools.cache
def one_step(config):
    return jax.device_get(one_device(config)(first_state(config), packed()))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_step_written_by_hand(name):
    config, (tokens, targets, segments, _) = CONFIGS[name], packed()

    def loss(params):
        output = Qwen2(config).apply({"params": params}, tokens, segment_ids=segments)
        return next_token_loss(config, output, targets, Z_LOSS).total

    params = parameters(config)
    total, gradients = jax.jit(jax.value_and_grad(loss))(params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda leaf: leaf * min(1, 0.5 / norm), gradients)

    def updated(path, leaf, gradient):
        decay = 0.0 if path[-1].key in ("scale", "bias") else 0.1
        # The first step of Adam divides each gradient by its own size.
        return leaf - 1e-2 * (gradient / (jnp.abs(gradient) + 1e-8) + decay * leaf)

    expected = jax.tree_util.tree_map_with_path(updated, params, gradients)
    state, metrics = one_step(config)
    assert state.step == 1
    np.testing.assert_allclose(metrics.loss, total, rtol=1e-6)
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-5)
    assert metrics.accepted and metrics.skipped == metrics.in_a_row == 0
    assert metrics.learning_rate == np.float32(1e-2)
    details = metrics.objective
    assert details["targets"] == (np.asarray(targets) >= 0).sum()
    assert (details["aux_loss"] > 0) == ("moe/router_entropy" in details) == config.is_moe
    parts = details["cross_entropy"] + Z_LOSS * details["z_loss"] + config.router_aux_loss_coef * details["aux_loss"]
    np.testing.assert_allclose(parts, total, rtol=1e-6)

    def compare(ours, theirs, gradient):
        certain = np.abs(gradient) > 1e-6  # of smaller ones, rounding decides the sign
        np.testing.assert_allclose(ours[certain], theirs[certain], atol=1e-4)

    jax.tree.map(compare, state.params, jax.device_get(expected), jax.device_get(gradients))
    moved = [new - old for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True)]
    np.testing.assert_allclose(metrics.update_norm, np.sqrt(sum(np.sum(np.square(one)) for one in moved)), rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_bfloat16_products(name):
    """The default; XLA:CPU has no kernel for some products in bfloat16, which only running one finds out."""
    config = CONFIGS[name]
    _, metrics = make_train_step(config, OPTIMIZER, Step(chunk=40), Poisoned())(first_state(config), packed())
    np.testing.assert_allclose(metrics.loss, one_step(config)[1].loss, rtol=1e-2)


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,expert=2,context=2"])
def test_a_mesh_equals_one_device(mesh, name):
    if name == "dense":
        mesh = mesh.replace("expert=2", "fsdp=2")
    config, mesh = CONFIGS[name], make_mesh(mesh)
    how = Step(dtype=jnp.float32, chunk=40, options=run_options(config, mesh), mesh=mesh)
    shardings = state_shardings(config, OPTIMIZER, mesh)
    given = jax.device_put(packed(), jax.tree.map(lambda x: batch_sharding(mesh, x.shape), packed()))
    step = make_train_step(config, OPTIMIZER, how, Poisoned())
    state, metrics = step(jax.device_put(first_state(config), shardings), given)
    one_state, one_metrics = one_step(config)
    jax.tree.map(lambda ours, one: np.testing.assert_allclose(ours, one, rtol=1e-5), metrics, one_metrics)

    def compare(path, ours, one, sharding):
        name = jax.tree_util.keystr(path)
        assert ours.sharding.is_equivalent_to(sharding, ours.ndim), name
        if "params" not in name:  # moments are the gradients and their squares; of the update only the sign is left
            np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-4 * np.abs(one).max(), err_msg=name)

    jax.tree_util.tree_map_with_path(compare, state, one_state, shardings)

    before = jax.device_get(state)
    tokens = given.tokens.at[0, 0].set(POISON)
    state, metrics = step(state, given._replace(tokens=jax.device_put(tokens, given.tokens.sharding)))
    assert not metrics.accepted and state.step == 2 and state.guard.skipped == 1
    assert_same_bits((state.params, state.optimizer), (before.params, before.optimizer))


def assert_same_bits(ours, theirs):
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), ours, theirs)
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize("name, mesh", [("dense", "fsdp=2,tensor=4"), ("tied", None)])
def test_accumulation_equals_the_large_batch(name, mesh):
    """Four micro-batches, of which each has another number of targets."""
    config, mesh = CONFIGS[name], mesh and make_mesh(mesh)
    how = Step(dtype=jnp.float32, chunk=40)
    whole, cut = packed(), jax.tree.map(lambda x: x.reshape(4, 2, -1), packed())
    params, objective, where = parameters(config), Pretraining(z_loss=Z_LOSS), None
    loss, sums, gradients = jax.jit(lambda params: loss_and_gradients(config, params, whole, how, objective))(params)
    how = how._replace(accumulate=4)
    if mesh:
        how = how._replace(options=run_options(config, mesh), mesh=mesh)
        where = state_shardings(config, OPTIMIZER, mesh).params
        rows = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh, cut.tokens.shape[1:]).spec))
        params, cut = jax.device_put(params, where), jax.device_put(cut, jax.tree.map(lambda _: rows, cut))
    found, found_sums, summed = jax.jit(
        lambda params, cut: loss_and_gradients(config, params, cut, how, objective, where)
    )(params, cut)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert found_sums.targets == sums.targets
    for ours, theirs in zip(found_sums[:2], sums[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max()),
        *jax.device_get((summed, gradients)),
    )


def test_a_batch_that_is_not_cut_is_refused():
    how = Step(dtype=jnp.float32, chunk=40, accumulate=4)
    with pytest.raises(ValueError, match=r"each array of a batch must be \[4, B, T\].*; the first axes are 8"):
        loss_and_gradients(DENSE, parameters(DENSE), packed(), how)


def test_twice_is_the_same_bits():
    state, metrics = one_step(MOE)
    again, again_metrics = one_device(MOE)(first_state(MOE), packed())
    assert_same_bits((again, again_metrics), (state, metrics))


@pytest.mark.parametrize("remat", sorted({*REMAT_POLICIES} - {"full"}))
def test_recomputing_does_not_change_the_step(remat):
    """Nor does keeping the projections in the host's memory."""
    how = Step(dtype=jnp.float32, chunk=40, remat=remat)
    state, metrics = make_train_step(DENSE, OPTIMIZER, how, Poisoned())(first_state(DENSE), packed())
    one_state, one_metrics = one_step(DENSE)
    np.testing.assert_allclose(metrics.loss, one_metrics.loss, rtol=1e-6)
    first, wanted = (optax.tree.get(one.optimizer, "mu") for one in (state, one_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), first, wanted)


def test_offloading_on_simulated_devices_is_refused():
    mesh = make_mesh("fsdp=8")
    with pytest.raises(ValueError, match='remat "offload" does not work on a mesh of CPU devices'):
        make_train_step(DENSE, OPTIMIZER, Step(remat="offload", options=run_options(DENSE, mesh), mesh=mesh))


def test_masters_in_bfloat16():
    """They lose what they round away; the moments are those of a step of float32 weights."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters(DENSE))
    state, metrics = one_device(DENSE)(new_state(OPTIMIZER, params), packed())
    one_state, one_metrics = one_step(DENSE)
    np.testing.assert_allclose(metrics.loss, one_metrics.loss, rtol=1e-2)
    np.testing.assert_allclose(metrics.update_norm, one_metrics.update_norm, rtol=1e-2)
    assert metrics.accepted
    for leaf, first in zip(jax.tree.leaves(state.params), jax.tree.leaves(parameters(DENSE)), strict=True):
        assert leaf.dtype == jnp.bfloat16 and np.any(leaf != first.astype(jnp.bfloat16))
    first, wanted = (optax.tree.get(one.optimizer, "mu") for one in (state, one_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max()), first, wanted)
    planned = abstract_state(DENSE, OPTIMIZER, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), planned)


@pytest.mark.parametrize("name", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_the_loss_falls(name):
    """In bfloat16 with recomputation, towards the entropy of a text in which every token tells the next."""
    config, optimizer = CONFIGS[name], adamw(1e-2)
    mesh = make_mesh("fsdp=8")
    step = make_train_step(config, optimizer, Step(options=run_options(config, mesh), mesh=mesh))
    state = init_state(config, optimizer, jax.random.key(0), mesh)
    places, rows = jnp.arange(32, dtype=jnp.int32), jnp.arange(8, dtype=jnp.int32)
    tokens = (places[None] * 5 + 8 * rows[:, None]) % config.vocab_size
    losses = []
    for _ in range(40):
        state, metrics = step(state, Batch(tokens, next_token_targets(tokens)))
        losses.append(float(metrics.objective["cross_entropy"]))
    assert losses[0] > 3 and losses[-1] < 0.5
    assert state.step == 40


def test_the_state_is_used_up():
    state = first_state(DENSE)
    one_device(DENSE)(state, packed())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_abstract_state_is_the_state():
    mesh = make_mesh("fsdp=4,tensor=2")
    optimizer = adamw(1e-3, moments_dtype=jnp.bfloat16)
    state, abstract = init_state(DENSE, optimizer, jax.random.key(0), mesh), abstract_state(DENSE, optimizer, mesh)

    def compare(real, planned):
        assert (real.shape, real.dtype) == (planned.shape, planned.dtype)
        assert real.sharding.is_equivalent_to(planned.sharding, real.ndim)

    jax.tree.map(compare, state, abstract)
    assert optax.tree.get(state.optimizer, "mu")["embed"]["embedding"].dtype == jnp.bfloat16
