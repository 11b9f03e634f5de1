"""How many tokens a batch of an evaluation may have: a bound from the memory that is free."""

import os
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Options
from qwen2_jax.model import Params

_MOST_SLOTS = {"cpu": 4096, "gpu": 32768, "tpu": 32768}
"""More tokens at once make no product faster, and padding only larger."""

_PASS_TOKENS = {"cpu": 16, "gpu": 256, "tpu": 256}
"""Operations that a device does while it reads one weight, halved: a weight and a token meet in two."""

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
    """The largest batch that fits, the same one in every process of a run; all of them must call this.

    Args:
      config: the model.
      params: its parameters, which are in memory already.
      dtype: of activations and cache.
      options: how the model runs.
      devices: that share a batch, row by row.
      free: bytes per device; what is free on the devices of the parameters by default.
    """
    own = _devices(params)
    free = _least(free_on_each(own)) if free is None else free
    activation, cache = slot_bytes(config, dtype, options)
    most = most_slots(own[0].platform)
    # Half for each; a batch without prefixes has no cache at all, and leaves that half to the compiler.
    slots = min(most, int(_SHARE / 2 * free / activation))
    cached = int(_SHARE / 2 * free / cache)
    return Room(max(1, slots) * devices, max(1, cached) * devices)


class Needs(NamedTuple):
    """Bytes that a batch takes on each device, at the worst moment."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def batch_needs(
    config: Qwen2Config,
    dtype: jax.typing.DTypeLike,
    weights: int,
    rows: int,
    prompt: int,
    new: int,
    *,
    at_once: int | None = None,
    options: Options = Options(),
    tensor: int = 1,
) -> Needs:
    """What reading prompts and continuing them takes, about; the scores of dense attention are left out.

    Args:
      config: the model.
      dtype: of activations and cache.
      weights: bytes of a device's part of the parameters.
      rows: of the batch, on one device.
      prompt: tokens of each.
      new: tokens that are added to each.
      at_once: tokens of prompts whose activations exist at once; all by default.
      options: how the model runs.
      tensor: devices that share heads, MLP and vocabulary.
    """
    activation, cache = slot_bytes(config, dtype, options, tensor)
    read = min(rows * prompt, at_once or rows * prompt)
    # Logits in float32, and what choosing makes of them.
    logits = 2 * 4 * rows * config.vocab_size
    # The prompts' cache is copied into one with room for the answers.
    copied = prompt if new else 0
    return Needs(weights, rows * (prompt + copied + new) * cache, read * activation + logits)


def most_slots(platform: str) -> int:
    """Tokens of a batch that are computed at once at most, on one device."""
    return _MOST_SLOTS.get(platform, _MOST_SLOTS["gpu"])


def pass_tokens(params: Params) -> int:
    """Tokens whose computing takes a device as long as reading its weights, about: with fewer, more are nearly free."""
    return _PASS_TOKENS.get(_devices(params)[0].platform, _PASS_TOKENS["gpu"])


def slot_bytes(
    config: Qwen2Config, dtype: jax.typing.DTypeLike, options: Options = Options(), tensor: int = 1
) -> tuple[int, int]:
    """Bytes that one token takes on each device: of activations, at the widest place of a layer; and of keys and
    values, in all. `tensor` is how many devices share heads and MLP."""
    itemsize = jnp.dtype(dtype).itemsize
    heads = config.num_attention_heads * config.head_dim
    inner = config.intermediate_size
    if config.is_moe:
        inner = config.shared_expert_intermediate_size + config.num_experts_per_tok * (
            config.moe_intermediate_size + config.hidden_size
        )
    # Float32 where sums are: the residual, its norm, queries with their rotated copies, and the three arrays of an MLP.
    activation = 4 * (3 * config.hidden_size + -(-(4 * heads + 3 * inner) // tensor))
    kv_heads = -(-config.num_key_value_heads * options.heads.copies // tensor)
    return activation, 2 * kv_heads * config.head_dim * config.num_hidden_layers * itemsize


def free_on_each(devices: Collection[Any]) -> int:
    """Bytes that are free on each of these devices of this process; simulated ones share the machine's memory."""
    share = len(devices) if all(device.platform == "cpu" for device in devices) else 1
    return min(map(free_bytes, devices)) // share


def _devices(params: Params) -> list[Any]:
    """Of this process, with parts of the parameters."""
    return list(jax.tree.leaves(params)[0].sharding.addressable_devices)


def _least(count: int) -> int:
    """The smallest of all processes' counts: batches of different shapes would wait for each other for good."""
    if jax.process_count() == 1:
        return count
    # Bytes exceed an int32, and JAX has no other integers here.
    return int(multihost_utils.process_allgather(np.float32(count)).min())


def free_bytes(device: Any) -> int:
    """Bytes that are free on a device; of a CPU, in the machine."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return max(0, statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on every system
        return _UNKNOWN
