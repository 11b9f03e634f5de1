"""Steps that must not count: decided inside the compiled step, before anything is changed."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128
"""Accepted steps that a spike is measured against."""


@dataclasses.dataclass(frozen=True)
class Guard:
    """When a step is skipped. A loss, a gradient norm or an update that is not finite always is."""

    spikes: float | None = None
    """Also skip steps whose loss or gradient norm is so many standard deviations above those of the last 128 accepted
    steps, from the 64th on."""

    def __post_init__(self):
        if self.spikes is not None and not self.spikes > 0:
            raise ValueError(f"spikes are so many standard deviations, more than 0, got {self.spikes}; None finds none")


class GuardState(NamedTuple):
    """What the guard remembers; of accepted steps only, lest one bad number make every later comparison false."""

    skipped: Any
    """Steps skipped so far, a scalar int32."""
    in_a_row: Any
    """Of these, the ones since the last accepted step."""
    accepted: Any
    """Steps accepted so far, a scalar int32."""
    losses: Any
    """[WINDOW] float32: of the last accepted steps; number n is at n % WINDOW."""
    gradient_norms: Any
    """Likewise."""


def init_guard() -> GuardState:
    """Of a run that has not begun."""
    counts = (jnp.zeros((), jnp.int32) for _ in range(3))
    windows = (jnp.zeros(WINDOW, jnp.float32) for _ in range(2))
    return GuardState(*counts, *windows)


def without_history(state: GuardState) -> GuardState:
    """Of a run whose losses are about to change, as with another kind of data: spikes are not measured against them."""
    old = state.accepted, state.losses, state.gradient_norms
    accepted, losses, norms = map(jnp.zeros_like, old)
    return state._replace(accepted=accepted, losses=losses, gradient_norms=norms)


def gone_back(state: GuardState) -> GuardState:
    """Of a run that goes on from a checkpoint: what was skipped before that is not in a row with what is to come."""
    return state._replace(in_a_row=jnp.zeros_like(state.in_a_row))


def acceptable(
    guard: Guard, state: GuardState, loss: jax.Array, gradient_norm: jax.Array, update_norm: jax.Array
) -> jax.Array:
    """Whether a step with these float32 scalars may count, a scalar bool."""
    accepted = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
    if guard.spikes is not None:
        accepted &= ~_spike(guard.spikes, state, state.losses, loss)
        accepted &= ~_spike(guard.spikes, state, state.gradient_norms, gradient_norm)
    return accepted


def recorded(state: GuardState, accepted: jax.Array, loss: jax.Array, gradient_norm: jax.Array) -> GuardState:
    """The state after a step that was accepted or not."""
    place = state.accepted % WINDOW
    one = accepted.astype(jnp.int32)
    return GuardState(
        skipped=state.skipped + 1 - one,
        in_a_row=jnp.where(accepted, 0, state.in_a_row + 1),
        accepted=state.accepted + one,
        losses=state.losses.at[place].set(jnp.where(accepted, loss, state.losses[place])),
        gradient_norms=state.gradient_norms.at[place].set(
            jnp.where(accepted, gradient_norm, state.gradient_norms[place])
        ),
    )


def _spike(sigmas: float, state: GuardState, window: jax.Array, value: jax.Array) -> jax.Array:
    filled = jnp.arange(WINDOW, dtype=jnp.int32) < state.accepted
    count = jnp.maximum(filled.sum(), 1).astype(jnp.float32)
    mean = jnp.where(filled, window, 0.0).sum() / count
    deviation = jnp.sqrt(jnp.where(filled, jnp.square(window - mean), 0.0).sum() / count)
    return (state.accepted >= WINDOW // 2) & (value > mean + sigmas * deviation)
