"""The pieces of a softmax that is computed in parts."""

import jax
import jax.numpy as jnp

from qwen2_jax.einsum import einsum

MASKED = -1e30
FLOOR = -1e29
"""Of a row's maximum: a row that sees nothing gets exp(MASKED - FLOOR) = 0 everywhere, not NaN."""


def scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Scaled scores [B, K, G, T, S] float32 of query [B, K, G, T, H] and key [B, K, S, H]."""
    products = einsum("BKGTH,BKSH->BKGTS", query, key)
    return products * query.shape[-1] ** -0.5


def weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sum over S of value [B, K, S, H] by weights [B, K, G, T, S]: [B, K, G, T, H] float32."""
    weights = weights.astype(value.dtype)
    return einsum("BKGTS,BKSH->BKGTH", weights, value)


def weighted_back(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Sum over G and T of x [B, K, G, T, H] by weights [B, K, G, T, S]: [B, K, S, H] float32, what keys get back."""
    weights = weights.astype(x.dtype)
    if x.dtype == jnp.float32:
        # XLA:CPU copies the left operand, turned, and x is the smaller one. In bfloat16 it lacks this form. On
        # accelerators the two are one.
        return einsum("BKGTH,BKGTS->BKHS", x, weights).swapaxes(2, 3)
    return einsum("BKGTS,BKGTH->BKSH", weights, x)


def row_sums(out: jax.Array, dout: jax.Array) -> jax.Array:
    """[B, K, G, T] float32: of each query's weights times their gradient, by way of the output and its gradient."""
    return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)


def scores_gradient(weights: jax.Array, sums: jax.Array, dout: jax.Array, value: jax.Array) -> jax.Array:
    """[B, K, G, T, S] float32: the gradient of query times key, which `scores` scales.

    Args:
      weights: of the whole softmax, [B, K, G, T, S] float32.
      sums: `row_sums` over all keys, [B, K, G, T].
      dout: the output's gradient, [B, K, G, T, H].
      value: [B, K, S, H].
    """
    dweights = einsum("BKGTH,BKSH->BKGTS", dout, value)
    return weights * (dweights - sums[..., None]) * value.shape[-1] ** -0.5


def nonzero(total: jax.Array) -> jax.Array:
    return jnp.where(total == 0, 1.0, total)


def merge(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """One attention over two sets of keys, from the attention (out [..., T, H], log-sum-exp [..., T]) over each.

    Both results are float32. A set without visible keys has a log-sum-exp of at most FLOOR and weighs nothing.
    """
    (out_a, lse_a), (out_b, lse_b) = first, second
    lse = jnp.logaddexp(lse_a, lse_b)
    weight_a, weight_b = jnp.exp(lse_a - lse)[..., None], jnp.exp(lse_b - lse)[..., None]
    return out_a.astype(jnp.float32) * weight_a + out_b.astype(jnp.float32) * weight_b, lse
