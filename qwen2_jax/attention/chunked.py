"""Attention by blocks with an online softmax: memory linear in T and S, and no work on blocks that nobody sees.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2. With Dual Chunk Attention a block of keys is met once
for each rotation that some query of the block needs: once, unless a chunk's border runs through one of the two, or rows
of a batch have theirs in different places.

Both passes are right for any range of keys (`Context.key_start`), the backward pass given the log-sum-exp and output
over all keys: keys may as well arrive in turn from other devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.attention.context import Context, Span, in_blocks, pad, part_of, parts_between, spans, visible
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

BLOCK = 512
"""Queries and keys per block, at most."""


class _Blocks:
    """How T queries and S keys are cut into blocks, and what each pair of blocks has to do with each other."""

    def __init__(self, context: Context, parts: int):
        queries, keys = context.query_segments.shape[1], context.key_segments.shape[1]
        self.q_size, self.k_size = min(BLOCK, queries), min(BLOCK, keys)
        labels = in_blocks(context, parts, self.q_size, self.k_size)
        self.q_segments, self.k_segments, self.q_chunks, self.k_chunks = labels
        self.query_start, self.key_start = context.query_start, context.key_start
        self.q_count = self.q_segments.shape[1] // self.q_size
        self.k_count = self.k_segments.shape[1] // self.k_size
        self.parts = parts
        self._first, self._stop = self._parts_between()

    def pad_q(self, x: jax.Array, dim: int) -> jax.Array:
        return pad(x, dim, self.q_size)

    def pad_k(self, x: jax.Array, dim: int) -> jax.Array:
        return pad(x, dim, self.k_size)

    def q_block(self, x: jax.Array, dim: int, i: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i * self.q_size, self.q_size, axis=dim)

    def k_block(self, x: jax.Array, dim: int, j: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, j * self.k_size, self.k_size, axis=dim)

    def keys_until(self, i: jax.Array) -> jax.Array:
        """How many blocks of keys, from the first, hold a key that does not stand after all queries of block i."""
        last_query = self.query_start + (i + 1) * self.q_size - 1
        return jnp.clip((last_query - self.key_start) // self.k_size + 1, 0, self.k_count)

    def _parts_between(self) -> tuple[jax.Array, jax.Array]:
        """[query blocks, key blocks] each: the range of rotations by which two blocks meet in some row.

        Rows share their loops. Known before these begin: rows on several devices then agree once, not at every step.
        """
        queries = spans(self.q_segments, self.q_chunks, self.q_size)
        keys = spans(self.k_segments, self.k_chunks, self.k_size)
        first, stop = parts_between(
            Span(*(ends[:, :, None] for ends in queries)), Span(*(ends[:, None, :] for ends in keys)), self.parts
        )
        met = stop > first
        return jnp.where(met, first, self.parts).min(axis=0), jnp.where(met, stop, 0).max(axis=0)

    def seen(self, i: jax.Array, j: jax.Array, part: jax.Array) -> jax.Array:
        """[B, 1, 1, T, S]: which keys of block j the queries of block i see, by rotation `part`."""
        q_slots = self.query_start + i * self.q_size + jnp.arange(self.q_size, dtype=jnp.int32)
        k_slots = self.key_start + j * self.k_size + jnp.arange(self.k_size, dtype=jnp.int32)
        q_segments, k_segments = self.q_block(self.q_segments, 1, i), self.k_block(self.k_segments, 1, j)
        seen = visible(q_slots, q_segments, k_slots, k_segments)
        if self.parts > 1:
            q_chunks, k_chunks = self.q_block(self.q_chunks, 1, i), self.k_block(self.k_chunks, 1, j)
            seen &= part_of(q_chunks, k_chunks, self.parts) == part
        return seen[:, None, None]

    def rotated(self, query: jax.Array, rotation: Rotation, i: jax.Array) -> jax.Array:
        """[R, B, K, G, T, H]: block i of a padded query, by every rotation."""
        return rotate(self.q_block(query, 3, i)[None], self._rotation(rotation, i))

    def rotated_gradient(self, gradient: jax.Array, rotation: Rotation, i: jax.Array) -> jax.Array:
        """The gradient [B, K, G, T, H] of block i, given that of `rotated`, [R, B, K, G, T, H]."""
        return rotate_gradient(gradient, self._rotation(rotation, i)).sum(axis=0)

    def _rotation(self, rotation: Rotation, i: jax.Array) -> Rotation:
        return Rotation(*(self.q_block(table, 2, i)[:, :, None, None] for table in rotation))

    def meet(self, i: jax.Array, step, carry):
        """Runs step(j, part, carry) for every block j of keys and rotation that query block i may need."""

        def key_block(j, carry):
            return lax.fori_loop(self._first[i, j], self._stop[i, j], lambda part, carry: step(j, part, carry), carry)

        return lax.fori_loop(0, self.keys_until(i), key_block, carry)


def steps(context: Context, parts: int) -> jax.Array:
    """How many blocks of scores a pass computes for each head, to count the work by."""
    blocks = _Blocks(context, parts)

    def query_block(count, i):
        return blocks.meet(i, lambda j, part, count: count + 1, count), None

    return lax.scan(query_block, jnp.zeros((), jnp.int32), jnp.arange(blocks.q_count, dtype=jnp.int32))[0]


def _forward(query, key, value, rotation, context):
    blocks = _Blocks(context, rotation.cos.shape[0])
    key, value = blocks.pad_k(key, 2), blocks.pad_k(value, 2)
    padded = blocks.pad_q(query, 3)
    rotation = Rotation(*(blocks.pad_q(table, 2) for table in rotation))

    def query_block(_, i):
        turned = blocks.rotated(padded, rotation, i)

        def step(j, part, carry):
            top, total, acc = carry
            products = scores(turned[part], blocks.k_block(key, 2, j))
            products = jnp.where(blocks.seen(i, j, part), products, MASKED)
            new_top = jnp.maximum(top, products.max(axis=-1))
            weights = jnp.exp(products - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + weighted(weights, blocks.k_block(value, 2, j))
            return new_top, total * shrink + weights.sum(axis=-1), acc

        shape = turned.shape[1:]
        top, total, acc = blocks.meet(i, step, (jnp.full(shape[:-1], FLOOR), jnp.zeros(shape[:-1]), jnp.zeros(shape)))
        return None, ((acc / nonzero(total)[..., None]).astype(query.dtype), top + jnp.log(nonzero(total)))

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(blocks.q_count, dtype=jnp.int32))
    queries = query.shape[3]
    return _joined(out, 3)[:, :, :, :queries], _joined(lse, 3)[:, :, :, :queries]


def _backward(query, key, value, rotation, context, out, lse, dout):
    blocks = _Blocks(context, rotation.cos.shape[0])
    keys, queries = key.shape[2], query.shape[3]
    key, value = blocks.pad_k(key, 2), blocks.pad_k(value, 2)
    query, out, dout, lse = (blocks.pad_q(x, 3) for x in (query, out, dout, lse))
    rotation = Rotation(*(blocks.pad_q(table, 2) for table in rotation))

    def query_block(carry, i):
        turned = blocks.rotated(query, rotation, i)
        o, do, top = (blocks.q_block(x, 3, i) for x in (out, dout, lse))
        sums = row_sums(o, do)

        def step(j, part, carry):
            dturned, dkey, dvalue = carry
            q, k, v = turned[part], blocks.k_block(key, 2, j), blocks.k_block(value, 2, j)
            weights = jnp.exp(jnp.where(blocks.seen(i, j, part), scores(q, k), MASKED) - top[..., None])
            dv = weighted_back(weights, do)
            dproducts = scores_gradient(weights, sums, do, v).astype(k.dtype)
            dq = weighted(dproducts, k)
            dk = weighted_back(dproducts, q)
            return _add(dturned, dq[None], 0, part), _add(dkey, dk, 2, j), _add(dvalue, dv, 2, j)

        dkey, dvalue = carry
        dturned, dkey, dvalue = blocks.meet(i, step, (jnp.zeros(turned.shape), dkey, dvalue))
        return (dkey, dvalue), blocks.rotated_gradient(dturned, rotation, i).astype(query.dtype)

    zeros = jnp.zeros(key.shape), jnp.zeros(value.shape)
    (dkey, dvalue), dquery = lax.scan(query_block, zeros, jnp.arange(blocks.q_count, dtype=jnp.int32))
    dkey, dvalue = dkey[:, :, :keys].astype(key.dtype), dvalue[:, :, :keys].astype(value.dtype)
    return _joined(dquery, 3)[:, :, :, :queries], dkey, dvalue


KERNEL = Kernel(_forward, _backward)


def _joined(blocks: jax.Array, dim: int) -> jax.Array:
    """[blocks, ...] with each block's part of `dim` -> [...] with all of it."""
    parts = jnp.moveaxis(blocks, 0, dim)
    return parts.reshape(*parts.shape[:dim], -1, *parts.shape[dim + 2 :])


def _add(total: jax.Array, part: jax.Array, dim: int, index: jax.Array) -> jax.Array:
    size = part.shape[dim]
    before = lax.dynamic_slice_in_dim(total, index * size, size, axis=dim)
    return lax.dynamic_update_slice_in_dim(total, before + part, index * size, axis=dim)
