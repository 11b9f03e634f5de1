"""The one entrance: which path computes attention."""

import functools
import math
from collections.abc import Callable

import jax

from qwen2_jax.attention import chunked, cudnn, pallas
from qwen2_jax.attention.context import Context
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.attention.flash import flash_attention
from qwen2_jax.rope import Rotation

_DENSE_LIMIT = 1024 * 1024
"""Scores per head up to which all are kept: the reference is faster for short inputs ..."""

_DENSE_TOTAL = 64 * 1024 * 1024
"""... and scores of all heads, rows and rotations together; their softmax takes 512 MB."""

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "dense": dense_attention,
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
    name: str | None, query: jax.Array, key: jax.Array, rotation: Rotation, by_blocks: str = "chunked"
) -> Callable[..., jax.Array]:
    """The named function, or for None the reference if that is faster, and else `by_blocks`; of a grouped query
    [B, K, G, T, H], key [B, K, S, H] and rotation [R, ...]. Raises ValueError for an unknown name."""
    if name is None:
        rows = math.prod(query.shape[:3]) * rotation.cos.shape[0]
        name = name_by_size(rows, query.shape[3], key.shape[2], by_blocks)
    return implementation_named(name)


def name_by_size(rows: int, queries: int, keys: int, by_blocks: str = "chunked") -> str:
    """The implementation that is taken where none is named, for so many queries and keys in each of `rows`, which are
    rows of the batch times heads times rotations."""
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
      implementation: "dense" or "chunked" anywhere, "pallas" on TPUs, "cudnn" on NVIDIA GPUs, or None to choose one
        of the first two by size. Or a function of the grouped query [B, K, G, T, H] and the four arguments after it.

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
        implementation = implementation_for(implementation, grouped, key, rotation)
    out = implementation(grouped, key, value, rotation, context)
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)
