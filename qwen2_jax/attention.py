"""Causal grouped-query attention: a dense reference, and a chunked path whose memory is linear in T and S.

Both take a `Context`, which says where the queries stand among the keys and which document each belongs to. A query
sees the keys of its own document that do not stand after it. Queries that see nothing (padding) get zeros.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 512
"""Queries and keys per block of the chunked path."""

_DENSE_LIMIT = 1024 * 1024
"""Scores per head up to which `attend` keeps them all: the reference is faster for short inputs."""

_MASKED = -1e30
_FLOOR = -1e29  # of a row's maximum: a row that sees nothing gets exp(_MASKED - _FLOOR) = 0 everywhere, not NaN


class Context(NamedTuple):
    """Where queries and keys stand.

    Keys stand at slots 0 .. S-1 and query t at slot `start + t`; RoPE positions play no part in what is visible.
    """

    start: jax.Array
    """Slot of the first query, a scalar int32."""
    query_segments: jax.Array
    """[B, T] int32, the document of each query; 0 is padding."""
    key_segments: jax.Array
    """[B, S] int32."""


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, context: Context, implementation: str | None = None
) -> jax.Array:
    """Softmax attention, scaled by H^-0.5.

    Args:
      query: [B, T, N, H].
      key: [B, K, S, H], heads before slots as the cache holds them; query head n reads key/value head n // (N / K).
      value: [B, K, S, H].
      context: who sees whom.
      implementation: "dense", "chunked", or None to choose by size.

    Returns:
      [B, T, N, H] of query's dtype.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation is None:
        implementation = "dense" if query.shape[1] * key.shape[2] <= _DENSE_LIMIT else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return IMPLEMENTATIONS[implementation](query, key, value, context)


def visible(query_slots: jax.Array, query_segments: jax.Array, key_slots: jax.Array, key_segments: jax.Array):
    """[B, T, S] bool: which keys (slots [S], segments [B, S]) each query (slots [T], segments [B, T]) sees."""
    causal = key_slots[None, None, :] <= query_slots[None, :, None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return causal & same & (key_segments != 0)[:, None, :]


def dense_attention(query: jax.Array, key: jax.Array, value: jax.Array, context: Context) -> jax.Array:
    """The reference: all scores [B, N, T, S] at once, softmax in float32. Arguments as for `attend`."""
    q_slots = context.start + jnp.arange(query.shape[1], dtype=jnp.int32)
    k_slots = jnp.arange(key.shape[2], dtype=jnp.int32)
    seen = visible(q_slots, context.query_segments, k_slots, context.key_segments)
    scores = jnp.where(seen[:, None, None], _scores(_split_heads(query, key), key), _MASKED)
    weights = jnp.exp(scores - jnp.maximum(scores.max(axis=-1, keepdims=True), _FLOOR))
    # Normalised after the product with the values: the same sum, over H numbers instead of S.
    out = _weighted(weights, value) / _nonzero(weights.sum(axis=-1))[..., None]
    return _join_heads(out).astype(query.dtype)


def chunked_attention(query: jax.Array, key: jax.Array, value: jax.Array, context: Context) -> jax.Array:
    """Online softmax over blocks of keys, for one block of queries after the other. Arguments as for `attend`.

    Blocks that lie wholly in the future of their queries are skipped, forward and backward. The gradient is exact: the
    backward pass recomputes each block's weights from the saved log-sum-exp.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
    """
    queries = query.shape[1]
    q_chunk, k_chunk = min(CHUNK, queries), min(CHUNK, key.shape[2])
    # Padding belongs to segment 0, which nobody sees and whose queries see nobody.
    padded = Context(context.start, _pad(context.query_segments, 1, q_chunk), _pad(context.key_segments, 1, k_chunk))
    key, value = _pad(key, 2, k_chunk), _pad(value, 2, k_chunk)
    grouped = _split_heads(_pad(query, 1, q_chunk), key)
    return _join_heads(_chunked(grouped, key, value, padded, q_chunk, k_chunk))[:, :queries]


IMPLEMENTATIONS = {"dense": dense_attention, "chunked": chunked_attention}


def _split_heads(query: jax.Array, key: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H]: batch axes first, so that the products below need no transposition."""
    batch, queries, heads, width = query.shape
    kv_heads = key.shape[1]
    return query.reshape(batch, queries, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _join_heads(out: jax.Array) -> jax.Array:
    """The inverse of `_split_heads`."""
    batch, kv_heads, groups, queries, width = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, kv_heads * groups, width)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Scaled scores [B, K, G, T, S] float32 of query [B, K, G, T, H] and key [B, K, S, H]."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, preferred_element_type=jnp.float32)
    return scores * query.shape[-1] ** -0.5


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sum over S of value [B, K, S, H] by weights [B, K, G, T, S]: [B, K, G, T, H] float32."""
    weights = weights.astype(value.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, value, preferred_element_type=jnp.float32)


def _nonzero(total: jax.Array) -> jax.Array:
    return jnp.where(total == 0, 1.0, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(query, key, value, context, q_chunk, k_chunk):
    return _chunked_fwd(query, key, value, context, q_chunk, k_chunk)[0]


def _chunked_fwd(query, key, value, context, q_chunk, k_chunk):
    def query_block(_, i):
        q = _block(query, 3, i, q_chunk)

        def key_block(j, carry):
            top, total, acc = carry
            seen = _block_visible(context, i, j, q_chunk, k_chunk)
            scores = jnp.where(seen, _scores(q, _block(key, 2, j, k_chunk)), _MASKED)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + _weighted(weights, _block(value, 2, j, k_chunk))
            return new_top, total * shrink + weights.sum(axis=-1), acc

        empty = jnp.full(q.shape[:-1], _FLOOR), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
        top, total, acc = lax.fori_loop(0, _key_blocks(context, i, q_chunk, k_chunk), key_block, empty)
        out = acc / _nonzero(total)[..., None]
        return None, (out.astype(query.dtype), top + jnp.log(_nonzero(total)))

    blocks = query.shape[3] // q_chunk
    _, (out, lse) = lax.scan(query_block, None, jnp.arange(blocks, dtype=jnp.int32))
    out = jnp.moveaxis(out, 0, 3).reshape(query.shape)
    return out, (query, key, value, context, out, lse)


def _chunked_bwd(q_chunk, k_chunk, residuals, dout):
    query, key, value, context, out, lse = residuals
    scale = query.shape[-1] ** -0.5

    def query_block(carry, i):
        q, o, do = (_block(x, 3, i, q_chunk) for x in (query, out, dout))
        # Row sums of dP * P, by way of out and its gradient.
        delta = jnp.einsum("BKGTH,BKGTH->BKGT", o, do, preferred_element_type=jnp.float32)

        def key_block(j, carry):
            dq, dkey, dvalue = carry
            k, v = _block(key, 2, j, k_chunk), _block(value, 2, j, k_chunk)
            seen = _block_visible(context, i, j, q_chunk, k_chunk)
            weights = jnp.exp(jnp.where(seen, _scores(q, k), _MASKED) - lse[i][..., None])
            dv = jnp.einsum("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), do, preferred_element_type=jnp.float32)
            dweights = jnp.einsum("BKGTH,BKSH->BKGTS", do, v, preferred_element_type=jnp.float32)
            dscores = (weights * (dweights - delta[..., None]) * scale).astype(k.dtype)
            dq += jnp.einsum("BKGTS,BKSH->BKGTH", dscores, k, preferred_element_type=jnp.float32)
            dk = jnp.einsum("BKGTS,BKGTH->BKSH", dscores, q, preferred_element_type=jnp.float32)
            return dq, _add_block(dkey, dk, j), _add_block(dvalue, dv, j)

        dkey, dvalue = carry
        last = _key_blocks(context, i, q_chunk, k_chunk)
        dq, dkey, dvalue = lax.fori_loop(0, last, key_block, (jnp.zeros(q.shape), dkey, dvalue))
        return (dkey, dvalue), dq.astype(query.dtype)

    blocks = query.shape[3] // q_chunk
    sums = jnp.zeros(key.shape), jnp.zeros(value.shape)
    (dkey, dvalue), dq = lax.scan(query_block, sums, jnp.arange(blocks, dtype=jnp.int32))
    dquery = jnp.moveaxis(dq, 0, 3).reshape(query.shape)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _pad(x: jax.Array, dim: int, chunk: int) -> jax.Array:
    """Pads a dim with zeros to a multiple of chunk."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % chunk)
    return jnp.pad(x, widths)


def _block(x: jax.Array, dim: int, index: jax.Array, chunk: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=dim)


def _add_block(total: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    chunk = part.shape[2]
    return lax.dynamic_update_slice_in_dim(total, _block(total, 2, index, chunk) + part, index * chunk, axis=2)


def _key_blocks(context: Context, i: jax.Array, q_chunk: int, k_chunk: int) -> jax.Array:
    """How many blocks of keys, from the first, hold a key that query block i may see."""
    last_slot = context.start + (i + 1) * q_chunk - 1
    return jnp.minimum(last_slot // k_chunk + 1, context.key_segments.shape[1] // k_chunk)


def _block_visible(context: Context, i: jax.Array, j: jax.Array, q_chunk: int, k_chunk: int) -> jax.Array:
    """`visible` of query block i and key block j, [B, 1, 1, T, S]."""
    q_slots = context.start + i * q_chunk + jnp.arange(q_chunk, dtype=jnp.int32)
    k_slots = j * k_chunk + jnp.arange(k_chunk, dtype=jnp.int32)
    q_segments = _block(context.query_segments, 1, i, q_chunk)
    k_segments = _block(context.key_segments, 1, j, k_chunk)
    return visible(q_slots, q_segments, k_slots, k_segments)[:, None, None]
