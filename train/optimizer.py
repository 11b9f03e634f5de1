"""AdamW as the report's training runs use it: weights decay, norms and biases do not."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwen2_jax.model import Params
from train.schedule import Schedule


class RateState(NamedTuple):
    """Of `scale_by_rate`."""

    updates: Any
    """Made so far, a scalar int32."""
    learning_rate: Any
    """Of the last one, a scalar float32."""


def adamw(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    moments_dtype: jax.typing.DTypeLike = jnp.float32,
    second_moments_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """AdamW after clipping the gradient's global norm; None does not clip.

    It computes in float32, whatever it stores. Beside weights in bfloat16, updates below 1/512 of a weight are lost.

    Args:
      learning_rate: a number, or a function of the number of updates made.
      moments_dtype: that the first moments are stored in.
      second_moments_dtype: likewise. In bfloat16, with b2 above 0.998, they no longer fall.

    Source: Decoupled weight decay regularization (arXiv 1711.05101), algorithm 2.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=moments_dtype)

    def init(params: Params) -> Any:
        # optax would store the second moments as the weights are.
        return adam.init(params)._replace(nu=optax.tree.zeros_like(params, dtype=second_moments_dtype))

    decay = optax.add_decayed_weights(weight_decay, mask=decays)

    def with_decay(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        return decay.update(updates, state, optax.tree.cast(params, jnp.float32))

    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.GradientTransformation(init, adam.update),
        optax.GradientTransformation(decay.init, with_decay),
        scale_by_rate(learning_rate),
    )


def decays(params: Params) -> Params:
    """Whether each parameter is subject to weight decay: all but the scales of norms and the biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def sgd(learning_rate: float | Schedule, *, clip_norm: float = 1.0) -> optax.GradientTransformation:
    """Gradient descent without moments after clipping the gradient's global norm."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), scale_by_rate(learning_rate))


def scale_by_rate(learning_rate: float | Schedule) -> optax.GradientTransformation:
    """Minus the rate times what it is given; its state says which rate that was, for the log."""

    def init(params: Params) -> RateState:
        return RateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Params, state: RateState, params: Params | None = None) -> tuple[Params, RateState]:
        rate = jnp.float32(learning_rate(state.updates) if callable(learning_rate) else learning_rate)
        return jax.tree.map(lambda leaf: -rate * leaf, updates), RateState(state.updates + 1, rate)

    return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "adamw-bf16": functools.partial(adamw, moments_dtype=jnp.bfloat16),
    "sgd": sgd,
}
"""By the names of the planner; each takes a learning rate or a schedule."""
