"""How many tokens a batch of an evaluation may have: a bound from the memory that is free."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Options
from qwen2_jax.model import Params

_MOST_SLOTS = {"cpu": 4096, "gpu": 32768, "tpu": 32768}
"""More tokens at once make no product faster, and padding only larger."""

_SHARE = 0.6
"""Of the free memory: the rest is for logits, results, and what the compiler moves around."""

_UNKNOWN = 2 * 1024**3
"""Bytes that are taken to be free where nothing says how many are."""


class Room(NamedTuple):
    """For one batch, over all devices."""

    slots: int
    """Tokens whose activations exist at once."""
    cached: int
    """Tokens whose keys and values exist at once."""


def room_for(
    config: Qwen2Config,
    params: Params,
    dtype: jax.typing.DTypeLike,
    options: Options = Options(),
    devices: int = 1,
    free: int | None = None,
) -> Room:
    """The largest batch that fits.

    Args:
      config: the model.
      params: its parameters, which are in memory already.
      dtype: of activations and cache.
      options: how the model runs.
      devices: that share a batch, row by row.
      free: bytes per device; those of the first device of the parameters by default.
    """
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    free = free_bytes(device) if free is None else free
    activation, cache = slot_bytes(config, dtype, options)
    most = _MOST_SLOTS.get(device.platform, _MOST_SLOTS["gpu"])
    # Half for each; a batch without prefixes has no cache at all, and leaves that half to the compiler.
    slots = min(most, int(_SHARE / 2 * free / activation))
    cached = int(_SHARE / 2 * free / cache)
    return Room(max(1, slots) * devices, max(1, cached) * devices)


def slot_bytes(config: Qwen2Config, dtype: jax.typing.DTypeLike, options: Options = Options()) -> tuple[int, int]:
    """Bytes that one token takes: of activations, at the widest place of a layer; and of keys and values, in all."""
    itemsize = jnp.dtype(dtype).itemsize
    heads = config.num_attention_heads * config.head_dim
    inner = config.intermediate_size
    if config.is_moe:
        inner = config.shared_expert_intermediate_size + config.num_experts_per_tok * (
            config.moe_intermediate_size + config.hidden_size
        )
    # Float32 where sums are: the residual, its norm, queries with their rotated copies, and the three arrays of an MLP.
    activation = 4 * (3 * config.hidden_size + 4 * heads + 3 * inner)
    kv_heads = config.num_key_value_heads * options.heads.copies
    return activation, 2 * kv_heads * config.head_dim * config.num_hidden_layers * itemsize


def free_bytes(device: Any) -> int:
    """Bytes that are free on a device; of a CPU, in the machine."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return max(0, statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on every system
        return _UNKNOWN
