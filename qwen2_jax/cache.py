"""The key/value cache of generation: an argument and a result of the model, of static size."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen2_jax.config import Qwen2Config
from qwen2_jax.heads import HeadLayout


@struct.dataclass
class Cache:
    """Rotated keys and values of S slots per row; slots from `length` on are empty.

    All rows append at the same slot, so a batch of prompts of different lengths leaves padding between a prompt and its
    continuation; segment 0 keeps it invisible.
    """

    layers: Any
    """Per layer (key, value), each [B, K, S, H]; of stacked layers one pair for each kind, with a leading axis."""
    segment_ids: jax.Array
    """[B, S] int32; 0 where a slot is empty or holds padding."""
    positions: jax.Array
    """[B, S] int32, where each key stands for RoPE: Dual Chunk Attention has to know each key's chunk."""
    length: jax.Array
    """Slots in use, a scalar int32."""

    @property
    def size(self) -> int:
        """S."""
        return self.segment_ids.shape[1]

    def check_room(self, tokens: int) -> None:
        """
        Raises:
          ValueError: if so many more tokens do not fit; while a program is being traced, nobody can tell.
        """
        if isinstance(self.length, jax.core.Tracer):
            return
        if (needed := int(self.length) + tokens) > self.size:
            raise ValueError(f"the cache has {self.size} slots, with these {tokens} tokens {needed} are needed")


def empty_cache(
    config: Qwen2Config,
    batch: int,
    size: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    stacked: bool = False,
    layout: HeadLayout = HeadLayout(),
) -> Cache:
    """A cache for `batch` rows of `size` slots, for parameters in the per-layer or the stacked form.

    `layout` must be that of the `Options` that the model runs with: copies of key/value heads are cached too.
    """
    period = config.layer_period
    count = config.num_hidden_layers if not stacked else period
    lead = (config.num_hidden_layers // period,) if stacked else ()
    shape = (*lead, batch, config.num_key_value_heads * layout.copies, size, config.head_dim)
    layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(count))
    slots = jnp.zeros((batch, size), jnp.int32)
    return Cache(layers, segment_ids=slots, positions=slots, length=jnp.zeros((), jnp.int32))


def copy_rows(cache: Cache, of: jax.Array) -> Cache:
    """A cache whose row i is row of[i] of another one; of is [B] int32."""

    def copied(x: jax.Array, dim: int) -> jax.Array:
        return jnp.take(x, of, axis=dim, mode="clip")

    return cache.replace(  # type: ignore[attr-defined]
        # Stacked layers have an axis in front of the rows.
        layers=jax.tree.map(lambda x: copied(x, x.ndim - 4), cache.layers),
        segment_ids=copied(cache.segment_ids, 0),
        positions=copied(cache.positions, 0),
    )


def extend_cache(cache: Cache, size: int) -> Cache:
    """The same cache with empty slots added, up to `size` of them in all."""

    def pad(x: jax.Array, dim: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[dim] = (0, size - cache.size)
        return jnp.pad(x, widths)

    return cache.replace(  # type: ignore[attr-defined]
        layers=jax.tree.map(lambda x: pad(x, -2), cache.layers),
        segment_ids=pad(cache.segment_ids, 1),
        positions=pad(cache.positions, 1),
    )
