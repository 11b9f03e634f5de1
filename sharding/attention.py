"""Attention on many devices: each runs a kernel on its own rows, its own heads, and two pieces of the sequence.

A causal query at the end of a sequence has far more to do than one at its beginning. Over `context`, a sequence is
therefore dealt out in twice as many pieces as there are devices, and each device computes one early and one late piece:
all have the same work. Outside of attention the sequence stays in its natural order, so queries are exchanged on the
way in and results on the way out. Keys and values of the whole sequence are gathered: with grouped queries they are
few, and nothing is left to merge, so Dual Chunk Attention and gradients are those of one device, exactly.

Source: the all-gather form is that of Llama 3 (arXiv 2407.21783, section 3.3.2), the dealing that of striped and
zigzag ring attention.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qwen2_jax.attention import Context, implementation_for, implementation_named
from qwen2_jax.rope import Rotation
from sharding.logical import ROW_AXES, axes_that_divide
from sharding.rules import check_mesh

_CONTEXT = "context"


@dataclasses.dataclass(frozen=True)
class SplitAttention:
    """An implementation of `qwen2_jax.attention.attend`, for `Options(attention=...)`, that is split over a mesh.

    The compiler can split "dense" and "chunked" by itself, but not the kernels "pallas" and "cudnn", nor any of them
    over `context` so that devices have equal work. Heads are split over `tensor`, rows over `data`, `fsdp` and
    `expert`, as many of these as divide them, and the sequence over `context` if it divides into two pieces for each
    device.

    Raises:
      ValueError: for an unknown implementation or mesh axis; when called, for key/value heads that `tensor` does not
        divide (`sharding.checks.layout_on` repeats and pads heads so that it does), or "cudnn" over `context`.
    """

    mesh: Mesh
    implementation: str | None = None
    """The name of one; None chooses for each device's part as `qwen2_jax.attention.choose` does, and on TPUs takes
    "pallas" for large ones."""

    def __post_init__(self):
        check_mesh(self.mesh)
        if self.implementation is not None:
            implementation_named(self.implementation)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, rotation: Rotation, context: Context):
        """Grouped query [B, K, G, T, H], key and value [B, K, S, H] -> [B, K, G, T, H]."""
        batch, kv_heads, _, queries, _ = query.shape
        devices = self.mesh.shape.get("tensor", 1)
        if kv_heads % devices:
            raise ValueError(f"{kv_heads} key/value heads do not divide over {devices} devices of tensor")
        heads = "tensor" if devices > 1 else None
        rows = axes_that_divide(batch, ROW_AXES, self.mesh.shape) or None
        pieces = 2 * self.mesh.shape.get(_CONTEXT, 1)
        dealt = pieces > 2 and queries % pieces == 0 and key.shape[2] % (pieces // 2) == 0
        length = _CONTEXT if dealt else None
        if dealt and self.implementation == "cudnn":
            raise ValueError("attention 'cudnn' needs whole sequences, which an axis of context cuts; use 'chunked'")

        over_slots = PartitionSpec(rows, heads, length)
        of_queries = PartitionSpec(rows, length)
        by_context = dataclasses.replace(
            jax.tree.map(lambda _: PartitionSpec(), context),
            query_segments=of_queries,
            query_chunks=None if context.query_chunks is None else of_queries,
            key_segments=PartitionSpec(rows),
            key_chunks=None if context.key_chunks is None else PartitionSpec(rows),
        )
        by_query = PartitionSpec(rows, heads, None, length)
        local = _local(self.implementation, self.mesh.devices.flat[0].platform)
        tables = jax.tree.map(lambda _: PartitionSpec(None, rows, length), rotation)
        split = jax.shard_map(
            _dealt(local, pieces // 2) if dealt else local,
            mesh=self.mesh,
            in_specs=(by_query, over_slots, over_slots, tables, by_context),
            out_specs=by_query,
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(query, key, value, rotation, context)


def _local(name: str | None, platform: str) -> Callable[..., jax.Array]:
    by_blocks = "pallas" if platform == "tpu" else "chunked"

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, rotation: Rotation, context: Context):
        implementation = implementation_for(name, query, key, rotation, context, platform, by_blocks)
        return implementation(query, key, value, rotation, context)

    return attention


def _dealt(local: Callable[..., jax.Array], devices: int) -> Callable[..., jax.Array]:
    """Attention of one of `devices` parts of the sequence."""

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, rotation: Rotation, context: Context):
        key, value = (lax.all_gather(x, _CONTEXT, axis=2, tiled=True) for x in (key, value))
        piece = query.shape[3] // 2
        queries = _deal(query, 3, devices)
        cos, sin = (_deal(table, 2, devices) for table in rotation)
        segments = _deal(context.query_segments, 1, devices)
        chunks = (None, None) if context.query_chunks is None else _deal(context.query_chunks, 1, devices)
        outs = []
        for half in (0, 1):
            here = context.replace(  # type: ignore[attr-defined]
                query_start=context.query_start + _piece(half, devices) * piece,
                query_segments=segments[half],
                query_chunks=chunks[half],
                aligned=False,
                whole_rows=False,
            )
            outs.append(local(queries[half], key, value, Rotation(cos[half], sin[half]), here))
        return _collect(outs, 3, devices)

    return attention


def _owner(piece: int, devices: int) -> int:
    """Who computes a piece: the first pieces go to the devices in order, the others in the opposite one."""
    return piece if piece < devices else 2 * devices - 1 - piece


def _piece(parity: int, devices: int) -> jax.Array:
    """Which piece of even or odd number this device computes; it has one of each."""
    device = lax.axis_index(_CONTEXT)
    return jnp.where(device % 2 == parity, device, 2 * devices - 1 - device).astype(jnp.int32)


def _deal(x: jax.Array, dim: int, devices: int) -> tuple[jax.Array, jax.Array]:
    """From this device's two neighbouring pieces along `dim` to the even and the odd piece that it computes."""
    even, odd = jnp.split(x, 2, axis=dim)
    return _send(even, 0, devices), _send(odd, 1, devices)


def _collect(pieces: Any, dim: int, devices: int) -> jax.Array:
    """The inverse of `_deal`."""
    parts = [_send(piece, parity, devices, back=True) for parity, piece in enumerate(pieces)]
    return jnp.concatenate(parts, axis=dim)


def _send(piece: jax.Array, parity: int, devices: int, back: bool = False) -> jax.Array:
    routes = [(device, _owner(2 * device + parity, devices)) for device in range(devices)]
    return lax.ppermute(piece, _CONTEXT, [(b, a) for a, b in routes] if back else routes)
