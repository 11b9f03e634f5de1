"""A step that must not count changes nothing but the counts, and the guard itself recovers."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.sharding.models import DENSE
from tests.xla import optimized
from train.guard import WINDOW, Guard, acceptable, init_guard, recorded
from train.optimizer import adamw
from train.step import loss_and_gradients, make_train_step, new_state

GOOD = np.ones((2, 8), np.float32)


class Points(NamedTuple):
    values: np.ndarray
    """[B, 8]"""
    gradient: np.ndarray
    """[B] bool: whether the gradient is NaN, though the loss is not."""


@dataclasses.dataclass(frozen=True)
class Distance:
    """Mean square distance of the parameters from points."""

    def weight(self, batch):
        return jnp.float32(len(batch.values))

    def __call__(self, config, params, batch, how, weight):
        kernel = params["kernel"]
        distances = jnp.square(kernel[None] - batch.values).sum(axis=1)
        # The root of 0 is 0, and has a gradient of 0 times infinity.
        roots = jnp.sqrt(jnp.where(batch.gradient[:, None], 0 * kernel[None], 1.0)).sum(axis=1)
        return (distances + roots).sum() / weight, ()

    def metrics(self, sums):
        return {}


def far_is_infinite() -> optax.GradientTransformation:
    """Makes an infinite update of a large, finite gradient."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: jnp.where(abs(u) > 1e6, jnp.inf, -0.1 * u), updates)
    )


OPTIMIZER = optax.chain(optax.trace(0.9), far_is_infinite())
BAD = {
    "data": Points(np.where(np.arange(8) == 3, np.nan, GOOD), np.array([False, False])),
    "loss": Points(np.float32(1e30) * GOOD, np.array([False, False])),
    "gradient": Points(GOOD, np.array([False, True])),
    "update": Points(np.float32(1e8) * GOOD, np.array([False, False])),
}


@pytest.fixture(scope="module")
def step():
    return make_train_step(DENSE, OPTIMIZER, objective=Distance())


def test_nothing_changes_when_something_is_not_finite(step):
    """Each bad batch on its own, then all in a row; in between, training goes on as if they had not been."""
    good = Points(GOOD, np.array([False, False]))
    state = new_state(OPTIMIZER, {"kernel": jnp.linspace(-1, 1, 8, dtype=jnp.float32)})
    undisturbed = jax.tree.map(jnp.copy, state)
    skipped = 0
    for n, names in enumerate([*([name] for name in BAD), list(BAD)]):
        for in_a_row, name in enumerate(names, start=1):
            before = jax.device_get(state)
            state, metrics = step(state, BAD[name])
            skipped += 1
            finite = [bool(np.isfinite(x)) for x in (metrics.loss, metrics.gradient_norm, metrics.update_norm)]
            assert finite == [name in ("gradient", "update"), name == "update", False], name
            assert (metrics.accepted, metrics.skipped, metrics.in_a_row) == (False, skipped, in_a_row)
            assert state.step == before.step + 1
            for ours, old in zip(
                jax.tree.leaves((state.params, state.optimizer, state.guard[2:])),
                jax.tree.leaves((before.params, before.optimizer, before.guard[2:])),
                strict=True,
            ):
                assert np.asarray(ours).tobytes() == np.asarray(old).tobytes(), name
        state, metrics = step(state, good)
        undisturbed, wanted = step(undisturbed, good)
        assert (metrics.accepted, metrics.skipped, metrics.in_a_row) == (True, skipped, 0)
        assert metrics.loss == wanted.loss and wanted.accepted
        np.testing.assert_array_equal(state.params["kernel"], undisturbed.params["kernel"])
        assert state.guard.accepted == undisturbed.guard.accepted == n + 1


def test_a_weight_that_is_not_finite_stops_all(step):
    """The loss of every batch is NaN: it is for the loop to go back to a checkpoint."""
    state = new_state(OPTIMIZER, {"kernel": jnp.full(8, jnp.nan)})
    for n in range(3):
        state, metrics = step(state, Points(GOOD, np.array([False, False])))
        assert (metrics.accepted, metrics.in_a_row) == (False, n + 1)


@dataclasses.dataclass(frozen=True)
class Product:
    """Mean square of products, whose gradient is a product too: an array in memory."""

    def weight(self, batch):
        return jnp.float32(len(batch))

    def __call__(self, config, params, batch, how, weight):
        return jnp.square(batch @ params["kernel"]).sum() / weight, ()

    def metrics(self, sums):
        return {}


def test_no_second_copy_of_the_state():
    """Parameters and moments are updated where they are, in as much memory as by a step without a guard."""
    optimizer, batch = adamw(1e-3), jax.ShapeDtypeStruct((4, 512), jnp.float32)
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    state = jax.eval_shape(lambda params: new_state(optimizer, params), params)

    def unguarded(state, batch):
        loss, _, gradients = loss_and_gradients(DENSE, state.params, batch, objective=Product())
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), optimizer=moments), loss

    with optimized(), jax.numpy_dtype_promotion("standard"):
        ours, plain = (
            step.lower(state, batch).compile().memory_analysis()
            for step in (
                make_train_step(DENSE, optimizer, objective=Product()),
                jax.jit(unguarded, donate_argnums=0),
            )
        )
    copy = 512 * 512 * 4
    assert ours.alias_size_in_bytes >= 3 * copy
    assert ours.temp_size_in_bytes < plain.temp_size_in_bytes + 0.1 * copy


def decisions(guard, losses, norms):
    @jax.jit
    def one(state, loss, norm):
        accepted = acceptable(guard, state, loss, norm, jnp.float32(1))
        return recorded(state, accepted, loss, norm), accepted

    state, accepted = init_guard(), []
    for loss, norm in zip(losses, norms, strict=True):
        state, one_accepted = one(state, loss, norm)
        accepted.append(bool(one_accepted))
    return accepted, state


def test_spikes_equal_numpy():
    """Losses with spikes, drops, NaN and infinity among them, early and late; some norms spike on their own."""
    dice = np.random.default_rng(0)
    losses = (3 + 0.1 * dice.normal(size=400)).astype(np.float32)
    norms = np.exp(0.2 * dice.normal(size=400)).astype(np.float32)
    losses[[10, 100, 230, 231, 399]] = 9.0
    losses[[5, 70, 240]] = np.nan, np.inf, np.nan
    losses[150] = 0.5  # good news is no spike
    norms[[63, 64, 300]] = 40.0
    norms[310] = np.nan
    accepted, state = decisions(Guard(spikes=6.0), losses, norms)

    kept, wanted = [], []
    for pair in np.stack([losses, norms], axis=1).astype(np.float64):
        window = np.array(kept[-WINDOW:]).reshape(-1, 2)
        spike = len(window) >= WINDOW // 2 and np.any(pair > window.mean(axis=0) + 6 * window.std(axis=0))
        wanted.append(bool(np.isfinite(pair).all() and not spike))
        if wanted[-1]:
            kept.append(pair)
    assert accepted == wanted
    # Spikes before the 64th accepted step are let through.
    assert [n for n in range(400) if not wanted[n]] == [5, 70, 100, 230, 231, 240, 300, 310, 399]
    assert (state.skipped, state.in_a_row, state.accepted) == (9, 1, 391)
    finite = np.isfinite(losses) & np.isfinite(norms)
    assert decisions(Guard(), losses, norms)[0] == finite.tolist()


def test_options_are_checked():
    with pytest.raises(ValueError, match="more than 0, got 0.0"):
        Guard(spikes=0.0)
