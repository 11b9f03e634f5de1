"""One step is AdamW on the gradients of the loss, on one device and on a mesh, and training works."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen2_jax import Qwen2
from qwen2_jax.model import abstract_params
from sharding import batch_sharding, make_mesh, run_options
from tests.sharding.models import DENSE, MOE, batch, parameters
from train import next_token_loss, next_token_targets
from train.optimizer import adamw, decays
from train.step import Batch, Step, TrainState, abstract_state, init_state, make_train_step, state_shardings

CONFIGS = {"dense": DENSE, "moe": MOE, "tied": dataclasses.replace(DENSE, tie_word_embeddings=True)}
OPTIMIZER = adamw(1e-2, clip_norm=0.5)


def new_state(config) -> TrainState:
    params = jax.tree.map(jnp.copy, parameters(config))  # a step uses its state up
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))


def packed() -> Batch:
    tokens, segments = map(jnp.asarray, batch())
    return Batch(tokens, next_token_targets(tokens, segments), segments)


@functools.cache
def one_step(config):
    step = make_train_step(config, OPTIMIZER, Step(dtype=jnp.float32, chunk=40))
    return jax.device_get(step(new_state(config), packed()))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_step_written_by_hand(name):
    config, (tokens, targets, segments, _) = CONFIGS[name], packed()

    def loss(params):
        output = Qwen2(config).apply({"params": params}, tokens, segment_ids=segments)
        return next_token_loss(config, output, targets).total

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
    assert metrics.targets == (np.asarray(targets) >= 0).sum()
    assert (metrics.aux_loss > 0) == bool(metrics.router) == config.is_moe

    def compare(ours, theirs, gradient):
        certain = np.abs(gradient) > 1e-6  # of smaller ones, rounding decides the sign
        np.testing.assert_allclose(ours[certain], theirs[certain], atol=1e-4)

    jax.tree.map(compare, state.params, jax.device_get(expected), jax.device_get(gradients))


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,expert=2,context=2"])
def test_a_mesh_equals_one_device(mesh, name):
    if name == "dense":
        mesh = mesh.replace("expert=2", "fsdp=2")
    config, mesh = CONFIGS[name], make_mesh(mesh)
    how = Step(dtype=jnp.float32, chunk=40, options=run_options(config, mesh), mesh=mesh)
    shardings = state_shardings(config, OPTIMIZER, mesh)
    given = jax.device_put(packed(), jax.tree.map(lambda x: batch_sharding(mesh, x.shape), packed()))
    state, metrics = make_train_step(config, OPTIMIZER, how)(jax.device_put(new_state(config), shardings), given)
    one_state, one_metrics = one_step(config)
    jax.tree.map(lambda ours, one: np.testing.assert_allclose(ours, one, rtol=1e-5), metrics, one_metrics)

    def compare(path, ours, one, sharding):
        name = jax.tree_util.keystr(path)
        assert ours.sharding.is_equivalent_to(sharding, ours.ndim), name
        if "params" not in name:  # moments are the gradients and their squares; of the update only the sign is left
            np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-4 * np.abs(one).max(), err_msg=name)

    jax.tree_util.tree_map_with_path(compare, state, one_state, shardings)


@pytest.mark.parametrize("name", ["dense", "moe"])
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
        losses.append(float(metrics.cross_entropy))
    assert losses[0] > 3 and losses[-1] < 0.5
    assert state.step == 40


def test_the_state_is_used_up():
    state = new_state(DENSE)
    make_train_step(DENSE, OPTIMIZER, Step(dtype=jnp.float32, chunk=40))(state, packed())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_norms_and_biases_do_not_decay():
    marks = decays(abstract_params(MOE))
    layer = marks["layers_0"]
    assert not any(jax.tree.leaves([marks["norm"], layer["attn_norm"], layer["mlp_norm"], layer["attn"]["q"]["bias"]]))
    assert all(jax.tree.leaves([marks["embed"], marks["lm_head"], layer["moe"], layer["attn"]["q"]["kernel"]]))


def test_abstract_state_is_the_state():
    mesh = make_mesh("fsdp=4,tensor=2")
    optimizer = adamw(1e-3, moments_dtype=jnp.bfloat16)
    state, abstract = init_state(DENSE, optimizer, jax.random.key(0), mesh), abstract_state(DENSE, optimizer, mesh)

    def compare(real, planned):
        assert (real.shape, real.dtype) == (planned.shape, planned.dtype)
        assert real.sharding.is_equivalent_to(planned.sharding, real.ndim)

    jax.tree.map(compare, state, abstract)
    assert optax.tree.get(state.optimizer, "mu")["embed"]["embedding"].dtype == jnp.bfloat16
