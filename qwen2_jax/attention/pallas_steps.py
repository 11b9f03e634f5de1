"""The steps of a blockwise attention kernel: which pairs of blocks it visits, in which order, by which rotations.

A grid over all pairs would step through those that nobody sees too, half of them for one document and nearly all for
many packed ones, and load their keys. So the pairs that matter are listed beforehand; the grid is as long as the list,
and the index maps of the kernel look their blocks up in it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen2_jax.attention.context import Context, Span, parts_between, spans


class Step(NamedTuple):
    """A pair of blocks. All int32; in a kernel scalars, when listing them arrays."""

    outer: jax.Array
    """The block that stays while `inner` runs: the queries', or when listed by keys the keys'."""
    inner: jax.Array
    first: jax.Array
    """The first of the rotations by which the two blocks meet."""
    stop: jax.Array
    """One after the last; `first` if they do not meet."""
    open: jax.Array
    """1 if every query sees every key, by one rotation: nothing is to be masked."""
    begins: jax.Array
    """1 if it is the first step of its outer block."""
    ends: jax.Array
    """1 if it is the last step of its outer block."""


_WIDTHS = (12, 12, 2, 2, 1, 1, 1)
"""Bits of a step's fields in an int32, the first one highest: sorted words are in the order of the blocks."""
MOST_BLOCKS = 1 << 12

_NOT_LISTED = jnp.iinfo(jnp.int32).max


def packed(step: Step) -> jax.Array:
    word = jnp.zeros((), jnp.int32)
    for field, width in zip(step, _WIDTHS, strict=True):
        word = (word << width) + field
    return word


def unpacked(word: jax.Array) -> Step:
    fields = []
    for width in reversed(_WIDTHS):
        fields.append(word & ((1 << width) - 1))
        word = word >> width
    return Step(*reversed(fields))


class Steps(NamedTuple):
    words: jax.Array
    """[B, most] int32, packed steps. What is left behind a row's last step repeats its blocks and does nothing."""
    longest: jax.Array
    """A scalar int32: the steps of the row that has most."""


def steps(context: Context, rotations: int, q_size: int, k_size: int, by_keys: bool = False) -> Steps:
    """Lists the pairs of blocks in which some query sees some key, and at least one pair for every outer block.

    Args:
      context: with queries and keys in whole blocks, and with chunks, all 0 without Dual Chunk Attention.
      rotations: R, of the query.
      q_size: queries per block.
      k_size: keys per block.
      by_keys: whether to go through the queries of each block of keys rather than the keys of each block of queries.
    """
    assert context.query_chunks is not None and context.key_chunks is not None
    queries = Span(*(ends[:, :, None] for ends in spans(context.query_segments, context.query_chunks, q_size)))
    keys = Span(*(ends[:, None, :] for ends in spans(context.key_segments, context.key_chunks, k_size)))
    first, stop = parts_between(queries, keys, rotations)

    q_blocks, k_blocks = (jnp.arange(count, dtype=jnp.int32) for count in first.shape[1:])
    q_slots = (context.query_start + q_blocks * q_size)[None, :, None]
    k_slots = (context.key_start + k_blocks * k_size)[None, None, :]
    stop = jnp.where(k_slots < q_slots + q_size, stop, first)
    document = _document(context.query_segments, q_size)[:, :, None]
    whole = (document != 0) & (document == _document(context.key_segments, k_size)[:, None, :])
    open_ = whole & (k_slots + k_size <= q_slots + 1) & (stop == first + 1)

    outer, inner = q_blocks[None, :, None], k_blocks[None, None, :]
    if by_keys:
        outer, inner = outer.swapaxes(1, 2), inner.swapaxes(1, 2)
        outer, inner, first, stop, open_ = inner, outer, *(x.swapaxes(1, 2) for x in (first, stop, open_))
    needed = stop > first
    listed = needed | (~needed.any(axis=-1, keepdims=True) & (inner == 0))  # a block that meets nothing writes zeros
    zero = jnp.zeros_like(first)
    words = packed(Step(zero + outer, zero + inner, first, stop, open_.astype(jnp.int32), zero, zero))
    return _in_order(words.reshape(len(words), -1), listed.reshape(len(words), -1))


def _in_order(words: jax.Array, listed: jax.Array) -> Steps:
    """The listed words [B, most] of each row, sorted, with the ends of their outer blocks marked."""
    last = unpacked(jnp.where(listed, words, 0).max(axis=-1, keepdims=True))
    idle = packed(last._replace(stop=last.first, open=jnp.zeros_like(last.open)))
    words = jnp.sort(jnp.where(listed, words, _NOT_LISTED), axis=-1)
    alive = words < _NOT_LISTED
    outer = jnp.where(alive, unpacked(words).outer, -1)
    edge = jnp.full_like(outer[:, :1], -1)
    begins = alive & (outer != jnp.concatenate([edge, outer[:, :-1]], axis=-1))
    ends = alive & (outer != jnp.concatenate([outer[:, 1:], edge], axis=-1))
    step = unpacked(jnp.where(alive, words, idle))
    words = packed(step._replace(begins=begins.astype(jnp.int32), ends=ends.astype(jnp.int32)))
    return Steps(words, listed.sum(axis=-1, dtype=jnp.int32).max())


def _document(segments: jax.Array, size: int) -> jax.Array:
    """[B, blocks]: the document that all tokens of a block belong to, 0 if there is none."""
    blocks = segments.reshape(len(segments), -1, size)
    first, last = blocks.min(axis=-1), blocks.max(axis=-1)
    return jnp.where(first == last, first, 0)
