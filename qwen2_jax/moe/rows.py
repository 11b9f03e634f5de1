"""Moving tokens to the experts' order and back, by gathers in both directions.

Automatic differentiation would turn each gather of rows into a scatter-add, which is slow on every accelerator. Both
moves are permutations, so the gradient of each is a gather by the other one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.einsum import einsum


class Groups(NamedTuple):
    """A permutation that brings the rows of each expert together; rows of nobody come last."""

    order: jax.Array
    """[R] int32: the row that each place holds."""
    place: jax.Array
    """[R] int32: the place of each row."""
    sizes: jax.Array
    """[E] int32: rows of each expert; they may sum to less than R."""


def group(expert_of_row: jax.Array, experts: int) -> Groups:
    """Groups rows by expert_of_row [R] int32 in 0 .. experts, where the last is nobody; stable within an expert."""
    rows = expert_of_row.size
    assert (experts + 1) * rows < 2**31, (experts, rows)
    index = jnp.arange(rows, dtype=jnp.int32)
    # One operand: TPUs' compiler takes several times as long over a stable sort of two, and XLA:CPU over running it.
    order = lax.sort(expert_of_row * rows + index, is_stable=False) % rows
    own = expert_of_row[:, None] == jnp.arange(experts + 1, dtype=jnp.int32)[None]
    so_far = jnp.cumsum(own, axis=0, dtype=jnp.int32)
    sizes = so_far[-1]
    first = jnp.cumsum(sizes) - sizes
    place = jnp.where(own, so_far - 1 + first[None], 0).sum(axis=1)
    return Groups(order, place, sizes[:-1])


@jax.custom_vjp
def permute(rows: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """rows[order], for a permutation and its inverse."""
    return rows[order]


permute.defvjp(
    lambda rows, order, place: (rows[order], place),
    lambda place, dout: (dout[place], None, None),
)


@jax.custom_vjp
def dispatch(x: jax.Array, groups: Groups) -> jax.Array:
    """x [X, D] repeated once for each of k choices, in the groups' order: [X * k, D].

    Row r of the groups is choice r % k of token r // k.
    """
    return x[groups.order // _choices(x, groups)]


def _choices(x: jax.Array, groups: Groups) -> int:
    return groups.order.size // x.shape[0]


def _dispatch_fwd(x, groups):
    return dispatch(x, groups), (x[:, :0], groups)  # of x only its number of rows is needed


def _dispatch_bwd(residuals, drows):
    x, groups = residuals
    dx = drows[groups.place].reshape(x.shape[0], _choices(x, groups), -1).astype(jnp.float32).sum(axis=1)
    return dx.astype(drows.dtype), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(rows: jax.Array, weights: jax.Array, groups: Groups) -> jax.Array:
    """The weighted sum of each token's k rows, summed in float32.

    Args:
      rows: [X * k, D], in the groups' order.
      weights: [X, k].

    Returns:
      [X, D], in the rows' dtype.
    """
    pairs = rows[groups.place].reshape(*weights.shape, -1)
    return einsum("XkD,Xk->XD", pairs, weights.astype(rows.dtype)).astype(rows.dtype)


def _combine_fwd(rows, weights, groups):
    return combine(rows, weights, groups), (rows, weights, groups)


def _combine_bwd(residuals, dy):
    rows, weights, groups = residuals
    dy = dy[groups.order // weights.shape[1]]
    dweights = einsum("XD,XD->X", rows, dy)[groups.place].reshape(weights.shape)
    drows = dy * weights.ravel()[groups.order][:, None].astype(dy.dtype)
    return drows, dweights.astype(weights.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)
