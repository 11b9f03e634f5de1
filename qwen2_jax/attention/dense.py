"""The reference: all scores at once. Also the faster path for short inputs and for single queries."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen2_jax.attention.context import Context, part_of, visible
from qwen2_jax.attention.softmax import FLOOR, MASKED, nonzero, scores, weighted
from qwen2_jax.rope import Rotation, rotate


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
    batch, kv_heads, groups, queries, width = query.shape
    parts = rotation.cos.shape[0]
    cos, sin = (jnp.moveaxis(table, 0, 1)[:, None, None] for table in rotation)
    turned = rotate(query[:, :, :, None], Rotation(cos, sin))
    # One product for all rotations: the keys, which are most of the bytes when there is one query, are read once.
    turned = turned.reshape(batch, kv_heads, groups, parts * queries, width)
    every = scores(turned, key).reshape(batch, kv_heads, groups, parts, queries, key.shape[2])

    chosen = every[:, :, :, 0]
    if parts > 1:
        assert context.query_chunks is not None and context.key_chunks is not None
        part = part_of(context.query_chunks, context.key_chunks, parts)[:, None, None]
        for i in range(1, parts):
            chosen = jnp.where(part == i, every[:, :, :, i], chosen)
    query_slots = context.query_start + jnp.arange(queries, dtype=jnp.int32)
    key_slots = context.key_start + jnp.arange(key.shape[2], dtype=jnp.int32)
    seen = visible(query_slots, context.query_segments, key_slots, context.key_segments)
    chosen = jnp.where(seen[:, None, None], chosen, MASKED)
    weights = jnp.exp(chosen - jnp.maximum(chosen.max(axis=-1, keepdims=True), FLOOR))
    # Normalised after the product with the values: the same sum, over H numbers instead of S.
    out = (weighted(weights, value) / nonzero(weights.sum(axis=-1))[..., None]).astype(query.dtype)
    return checkpoint_name(out, "attended")
