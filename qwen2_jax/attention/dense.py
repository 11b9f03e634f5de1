"""The reference: all scores at once. Also the faster path for short inputs and for single queries.

`attend` runs it by `KERNEL`, whose backward pass computes the scores again: they are cheaper to compute than to keep,
and automatic differentiation would multiply float32 gradients with bfloat16 operands. Where queries and keys are
aligned, it goes through a few groups of queries, each with the keys up to its own last: the others nobody sees.
`dense_attention` is the same function, in one piece, for automatic differentiation, to hold the gradient rules to.
"""

from typing import NamedTuple

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
    """float32 gradients of query, key and value."""
    turned = _rotated(query, rotation)
    weights = jnp.exp(_masked(scores(turned, key), context) - lse[..., None])
    dvalue = weighted_back(weights, dout)
    dproducts = scores_gradient(weights, row_sums(out, dout), dout, value)
    dproducts = _by_part(dproducts, context, len(rotation.cos)).astype(key.dtype)
    dkey = weighted_back(dproducts, turned)
    dturned = weighted(dproducts, key)
    dquery = rotate_gradient(_in_parts(dturned, query.shape[3]), _tables(rotation)).sum(axis=3)
    return dquery, dkey, dvalue


_GROUPS = 4
"""Of aligned queries, at most: with so many, 5/8 of all scores are computed."""

_LEAST = 128
"""Queries of a group, at least: what is saved on fewer is lost to the number of products."""


class _Group(NamedTuple):
    """Queries a..b of an input, and all keys that they may see: the first ones."""

    queries: slice
    keys: slice

    def of_inputs(self, query, key, value, rotation, context):
        query, key, value = query[:, :, :, self.queries], key[:, :, self.keys], value[:, :, self.keys]
        return query, key, value, Rotation(*(table[:, :, self.queries] for table in rotation)), self._of(context)

    def _of(self, context: Context) -> Context:
        def cut(labels: jax.Array | None, part: slice) -> jax.Array | None:
            return None if labels is None else labels[:, part]

        return context.replace(  # type: ignore[attr-defined]
            query_start=context.query_start + self.queries.start,
            query_segments=cut(context.query_segments, self.queries),
            key_segments=cut(context.key_segments, self.keys),
            query_chunks=cut(context.query_chunks, self.queries),
            key_chunks=cut(context.key_chunks, self.keys),
        )


def _groups(context: Context, queries: int, keys: int) -> list[_Group]:
    if not context.aligned:
        return [_Group(slice(0, queries), slice(0, keys))]
    size = max(_LEAST, -(-queries // _GROUPS))
    ends = [(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [_Group(slice(start, stop), slice(0, stop)) for start, stop in ends]


def _forward_by_groups(query, key, value, rotation, context):
    groups = _groups(context, query.shape[3], key.shape[2])
    parts = [_forward(*group.of_inputs(query, key, value, rotation, context)) for group in groups]
    out, lse = (jnp.concatenate(of_groups, axis=3) for of_groups in zip(*parts, strict=True))
    return out, lse


def _backward_by_groups(query, key, value, rotation, context, out, lse, dout):
    keys = key.shape[2]
    dqueries, dkey, dvalue = [], jnp.zeros(key.shape), jnp.zeros(value.shape)
    for group in _groups(context, query.shape[3], keys):
        results = (x[:, :, :, group.queries] for x in (out, lse, dout))
        dq, *of_keys = _backward(*group.of_inputs(query, key, value, rotation, context), *results)
        unseen = (0, 0), (0, 0), (0, keys - group.keys.stop), (0, 0)
        dk, dv = (jnp.pad(x, unseen) for x in of_keys)
        dqueries.append(dq)
        dkey, dvalue = dkey + dk, dvalue + dv
    dquery = jnp.concatenate(dqueries, axis=3)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype)


KERNEL = Kernel(_forward_by_groups, _backward_by_groups)


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
