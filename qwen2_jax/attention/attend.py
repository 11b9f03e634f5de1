"""The one entrance: which path computes attention."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen2_jax.attention import chunked, cudnn, dense, pallas
from qwen2_jax.attention.context import Context
from qwen2_jax.attention.flash import flash_attention
from qwen2_jax.rope import Rotation
from qwen2_jax.target import target_platform

_DENSE_LIMIT = 1024 * 1024
"""Scores per head up to which all are kept: the reference is faster for short inputs ..."""

_DENSE_TOTAL = 64 * 1024 * 1024
"""... and scores of all heads, rows and rotations together; their softmax takes 512 MB."""

_CUDNN_LEAST = 256
"""Queries from which on cuDNN is taken: it computes blocks of 128 at least."""

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "dense": functools.partial(flash_attention, dense.KERNEL),
    "chunked": functools.partial(flash_attention, chunked.KERNEL),
    "pallas": functools.partial(flash_attention, pallas.KERNEL),
    "cudnn": functools.partial(flash_attention, cudnn.KERNEL),
}


def implementation_named(name: str) -> Callable[..., jax.Array]:
    """The function of the grouped query, key, value, rotation and context. Raises ValueError for an unknown name."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return IMPLEMENTATIONS[name]


def implementation_for(
    name: str | None,
    query: jax.Array,
    key: jax.Array,
    rotation: Rotation,
    context: Context,
    platform: str | None = None,
    by_blocks: str = "chunked",
) -> Callable[..., jax.Array]:
    """The named function, or for None that of `choose`; of a grouped query [B, K, G, T, H], key [B, K, S, H] and
    rotation [R, ...]. "cudnn" is for prompts: queries that see a longer cache take that of `choose`, too. Raises
    ValueError for an unknown name."""
    if name == "cudnn" and query.shape[3] != key.shape[2]:
        name = None
    if name is None:
        name = choose(
            rows=math.prod(query.shape[:3]) * rotation.cos.shape[0],
            queries=query.shape[3],
            keys=key.shape[2],
            width=query.shape[4],
            dtype=query.dtype,
            whole_rows=context.whole_rows,
            chunk_length=context.chunk_length,
            platform=platform or target_platform(),
            by_blocks=by_blocks,
        )
    return implementation_named(name)


def choose(
    *,
    rows: int,
    queries: int,
    keys: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    whole_rows: bool,
    chunk_length: int,
    platform: str,
    by_blocks: str = "chunked",
) -> str:
    """The implementation that is taken where none is named.

    On NVIDIA GPUs "cudnn" for prompts and for training on rows of one document each, where its rules hold and a trial
    shows that it computes what it should; elsewhere, "dense" for short inputs and else `by_blocks`.

    Args:
      rows: of the batch, times heads, times rotations.
      queries: of each row.
      keys: of each row.
      width: of a head.
      dtype: of the query.
      whole_rows: as `Context` has it, like `chunk_length`.
      chunk_length: tokens of a chunk of Dual Chunk Attention, or 0.
      platform: "cpu", "gpu" or "tpu".
      by_blocks: what long inputs take.
    """
    if platform == "gpu" and queries >= _CUDNN_LEAST:
        dtype = jnp.dtype(dtype)
        if cudnn.refusal(dtype, width, whole_rows, chunk_length) is None and cudnn.works(dtype, width):
            return "cudnn"
    each = queries * keys
    return "dense" if each <= _DENSE_LIMIT and each * rows <= _DENSE_TOTAL else by_blocks


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rotation: Rotation,
    context: Context,
    implementation: str | Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention, scaled by H^-0.5.

    Args:
      query: [B, T, N, H], not rotated.
      key: [B, K, S, H], rotated; heads before slots as the cache holds them. Query head n reads key/value head
        n // (N / K).
      value: [B, K, S, H].
      rotation: of the query, [R, B, T, H/2]: R is 1, or 3 for Dual Chunk Attention.
      context: who sees whom, and by which rotation.
      implementation: "dense" or "chunked" anywhere, "pallas" on TPUs, "cudnn" on NVIDIA GPUs, or None for that of
        `choose`. Or a function of the grouped query [B, K, G, T, H] and the four arguments after it.

    Returns:
      [B, T, N, H] of query's dtype. Queries that see nothing (padding) get zeros.

    Raises:
      ValueError: for an unknown implementation, or one that cannot compute this.
    """
    batch, queries, heads, width = query.shape
    kv_heads = key.shape[1]
    # [B, K, G, T, H]: batch axes first, so that no product needs a transposition.
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    if implementation is None or isinstance(implementation, str):
        implementation = implementation_for(implementation, grouped, key, rotation, context)
    out = implementation(grouped, key, value, rotation, context)
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)
