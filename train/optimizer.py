"""AdamW as the report's training runs use it: weights decay, norms and biases do not."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qwen2_jax.model import Params


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    moments_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """AdamW after clipping the gradient's global norm; None does not clip.

    Args:
      moments_dtype: of the first moment; None takes the parameters'.

    Source: Decoupled weight decay regularization (arXiv 1711.05101), algorithm 2.
    """
    update = optax.adamw(learning_rate, b1, b2, eps, mu_dtype=moments_dtype, weight_decay=weight_decay, mask=decays)
    return update if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), update)


def decays(params: Params) -> Params:
    """Whether each parameter is subject to weight decay: all but the scales of norms and the biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def sgd(learning_rate: optax.ScalarOrSchedule, *, clip_norm: float = 1.0) -> optax.GradientTransformation:
    """Gradient descent without state after clipping the gradient's global norm."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.sgd(learning_rate))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "adamw-bf16": functools.partial(adamw, moments_dtype=jnp.bfloat16),
    "sgd": sgd,
}
"""By the names of the planner; each takes a learning rate or a schedule."""
