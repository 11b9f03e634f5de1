"""The key/value cache of generation: an argument and a result of the model, of static size."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen2_jax.config import Qwen2Config


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
    length: jax.Array
    """Slots in use, a scalar int32."""

    @property
    def size(self) -> int:
        """S."""
        return self.segment_ids.shape[1]


def empty_cache(
    config: Qwen2Config, batch: int, size: int, dtype: jax.typing.DTypeLike = jnp.bfloat16, stacked: bool = False
) -> Cache:
    """A cache for `batch` rows of `size` slots, for parameters in the per-layer or the stacked form."""
    period = config.layer_period
    count = config.num_hidden_layers if not stacked else period
    lead = (config.num_hidden_layers // period,) if stacked else ()
    shape = (*lead, batch, config.num_key_value_heads, size, config.head_dim)
    layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(count))
    return Cache(layers, jnp.zeros((batch, size), jnp.int32), jnp.zeros((), jnp.int32))
