"""The reference: all scores at once. Also the faster path for short inputs and for single queries.

`attend` runs it by `KERNEL`, whose backward pass computes the scores again: they are cheaper to compute than to keep,
and automatic differentiation would multiply float32 gradients with bfloat16 operands. `dense_attention` is the same
function for automatic differentiation, to hold the gradient rules to.
"""

import jax
import jax.numpy as jnp

from qwen2_jax.attention.context import Context, part_of, visible
from qwen2_jax.attention.flash import Kernel
from qwen2_jax.attention.softmax import (
    FLOOR,
    MASKED,
    nonzero,
    row_sums,
    scores,
    scores_gradient,
    weighted,
    weighted_back,
)
from qwen2_jax.rope import Rotation, rotate, rotate_gradient


def dense_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, rotation: Rotation, context: Context
) -> jax.Array:
    """[B, K, G, T, H] of query's dtype, by scores [B, K, G, R, T, S] and their softmax in float32.

    Args:
      query: [B, K, G, T, H], not rotated.
      key: [B, K, S, H], rotated.
      value: [B, K, S, H].
      rotation: of the query, [R, B, T, H/2].
      context: who sees whom.
    """
    return _forward(query, key, value, rotation, context)[0]


def _forward(query, key, value, rotation, context):
    products = _masked(scores(_rotated(query, rotation), key), context)
    top = jnp.maximum(products.max(axis=-1), FLOOR)
    weights = jnp.exp(products - top[..., None])
    total = nonzero(weights.sum(axis=-1))
    # Normalised after the product with the values: the same sum, over H numbers instead of S.
    out = (weighted(weights, value) / total[..., None]).astype(query.dtype)
    return out, top + jnp.log(total)


def _backward(query, key, value, rotation, context, out, lse, dout):
    turned = _rotated(query, rotation)
    weights = jnp.exp(_masked(scores(turned, key), context) - lse[..., None])
    dvalue = weighted_back(weights, dout)
    dproducts = scores_gradient(weights, row_sums(out, dout), dout, value)
    dproducts = _by_part(dproducts, context, len(rotation.cos)).astype(key.dtype)
    dkey = weighted_back(dproducts, turned)
    dturned = weighted(dproducts, key)
    dquery = rotate_gradient(_in_parts(dturned, query.shape[3]), _tables(rotation)).sum(axis=3)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype)


KERNEL = Kernel(_forward, _backward)


def _tables(rotation: Rotation) -> Rotation:
    """For arrays [B, K, G, R, T, H]."""
    return Rotation(*(jnp.moveaxis(table, 0, 1)[:, None, None] for table in rotation))


def _rotated(query: jax.Array, rotation: Rotation) -> jax.Array:
    """[B, K, G, R * T, H]: the query by all rotations one after the other, so that one product reads the keys once.

    They are most of the bytes when there is one query.
    """
    turned = rotate(query[:, :, :, None], _tables(rotation))
    return turned.reshape(*query.shape[:3], -1, query.shape[-1])


def _in_parts(x: jax.Array, queries: int) -> jax.Array:
    """[B, K, G, R * T, X] as [B, K, G, R, T, X]."""
    return x.reshape(*x.shape[:3], -1, queries, x.shape[-1])


def _part(context: Context, parts: int) -> jax.Array:
    """[B, 1, 1, T, S]: which rotation of a query meets a key."""
    assert context.query_chunks is not None and context.key_chunks is not None
    return part_of(context.query_chunks, context.key_chunks, parts)[:, None, None]


def _masked(products: jax.Array, context: Context) -> jax.Array:
    """[B, K, G, T, S]: of products [B, K, G, R * T, S] those of the rotation that counts, MASKED where none is seen."""
    queries, keys = context.query_segments.shape[1], context.key_segments.shape[1]
    every = _in_parts(products, queries)
    chosen, parts = every[:, :, :, 0], every.shape[3]
    if parts > 1:
        part = _part(context, parts)
        for i in range(1, parts):
            chosen = jnp.where(part == i, every[:, :, :, i], chosen)
    query_slots = context.query_start + jnp.arange(queries, dtype=jnp.int32)
    key_slots = context.key_start + jnp.arange(keys, dtype=jnp.int32)
    seen = visible(query_slots, context.query_segments, key_slots, context.key_segments)
    return jnp.where(seen[:, None, None], chosen, MASKED)


def _by_part(chosen: jax.Array, context: Context, parts: int) -> jax.Array:
    """[B, K, G, R * T, S]: chosen [B, K, G, T, S] for the rotation that each came by, and zeros for the others."""
    if parts == 1:
        return chosen
    part = _part(context, parts)
    return jnp.concatenate([jnp.where(part == i, chosen, 0.0) for i in range(parts)], axis=3)
