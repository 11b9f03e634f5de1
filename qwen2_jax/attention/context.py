"""Who sees whom in attention, and by which rotation of the query: token by token, and block by block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Context:
    """Where queries and keys stand, and which document and chunk each belongs to.

    Key s stands at slot `key_start + s` and query t at slot `query_start + t`. A query sees the keys of its own
    document that do not stand after it. RoPE positions play no part in what is visible; with Dual Chunk Attention they
    decide the chunk, and the chunks of a query and a key decide which rotation of the query meets that key.
    """

    query_start: jax.Array
    """A scalar int32."""
    key_start: jax.Array
    query_segments: jax.Array
    """[B, T] int32, the document of each query; 0 is padding."""
    key_segments: jax.Array
    """[B, S] int32."""
    query_chunks: jax.Array | None = None
    """[B, T] int32, or None without Dual Chunk Attention."""
    key_chunks: jax.Array | None = None
    """[B, S] int32."""
    chunk_length: int = struct.field(pytree_node=False, default=0)
    """Tokens of a chunk, or 0 without Dual Chunk Attention."""
    aligned: bool = struct.field(pytree_node=False, default=False)
    """Known when the program is built: T = S, and query t stands where key t stands, so that it sees none behind it."""
    whole_rows: bool = struct.field(pytree_node=False, default=False)
    """Known when the program is built: queries and keys are aligned, and each row is one document from the first slot
    on, at positions 0, 1, ..., with padding behind it at most. What queries of padding get is then nobody's concern."""


def visible(query_slots: jax.Array, query_segments: jax.Array, key_slots: jax.Array, key_segments: jax.Array):
    """[B, T, S] bool: which keys (slots [S], segments [B, S]) each query (slots [T], segments [B, T]) sees."""
    causal = key_slots[None, None, :] <= query_slots[None, :, None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return causal & same & (key_segments != 0)[:, None, :]


def part_of(query_chunks: jax.Array, key_chunks: jax.Array, rotations: int) -> jax.Array:
    """[B, T, S]: which of the query's rotations meets each key, by their chunks [B, T] and [B, S]."""
    return jnp.clip(query_chunks[:, :, None] - key_chunks[:, None, :], 0, rotations - 1)


def in_blocks(
    context: Context, rotations: int, q_size: int, k_size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Segments of queries and keys, then their chunks, each for whole blocks; one rotation has one chunk of everything.

    What is added belongs to segment 0, padding, which nobody sees and whose queries see nobody.
    """
    q_segments, k_segments = pad(context.query_segments, 1, q_size), pad(context.key_segments, 1, k_size)
    q_chunks, k_chunks = jnp.zeros_like(q_segments), jnp.zeros_like(k_segments)
    if rotations > 1:
        assert context.query_chunks is not None and context.key_chunks is not None
        q_chunks, k_chunks = pad(context.query_chunks, 1, q_size), pad(context.key_chunks, 1, k_size)
    return q_segments, k_segments, q_chunks, k_chunks


class Span(NamedTuple):
    """The smallest and largest segment and chunk in blocks of tokens, each [B, blocks] int32; padding does not count.

    A block of nothing but padding has its smallest above its largest.
    """

    first_segment: jax.Array
    last_segment: jax.Array
    first_chunk: jax.Array
    last_chunk: jax.Array


def spans(segments: jax.Array, chunks: jax.Array, size: int) -> Span:
    """The spans of blocks of `size` tokens of segments and chunks, both [B, blocks * size]."""
    none = jnp.iinfo(jnp.int32).max

    def ends(values):
        first = jnp.where(segments != 0, values, none).reshape(len(segments), -1, size).min(axis=-1)
        return first, jnp.where(segments != 0, values, -1).reshape(len(segments), -1, size).max(axis=-1)

    return Span(*ends(segments), *ends(chunks))


def parts_between(queries: Span, keys: Span, rotations: int) -> tuple[jax.Array, jax.Array]:
    """The first rotation, and one after the last, that queries of a block may meet keys of another block with.

    Equal where no query can see a key for belonging to another document. A bound: without packed documents and padding
    it is exact.
    """
    first = jnp.clip(queries.first_chunk - keys.last_chunk, 0, rotations - 1)
    last = jnp.clip(queries.last_chunk - keys.first_chunk, 0, rotations - 1)
    shared = (queries.first_segment <= keys.last_segment) & (keys.first_segment <= queries.last_segment)
    return first, jnp.where(shared, last + 1, first)


def pad(x: jax.Array, dim: int, size: int) -> jax.Array:
    """x with zeros behind it in `dim`, up to a whole number of blocks of `size`; of segments, 0 is padding."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % size)
    return jnp.pad(x, widths)
