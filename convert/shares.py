"""Loading by several processes: each chunk of a file is read once, by one of them, and XLA moves it where it belongs.

Files hold whole rows, while `fsdp` mostly cuts through them: processes that read what their own devices hold would each
read nearly everything. Chunks are dealt out instead, whole ones, because one of a checkpoint of ours has one digest.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.boxes import Bounds, box_size, intersection, resolved
from convert.chunks import Chunk
from convert.names import Shape

_NOTICEABLE = 1.1


def is_shared(sharding: NamedSharding, shape: Shape, chunks: Sequence[Chunk]) -> bool:
    """Whether processes that read the chunks that their devices' parts of an array meet, read noticeably too much."""
    boxes: dict[int, set[Bounds]] = defaultdict(set)
    indices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
    for device, index in indices.items():
        boxes[device.process_index].add(resolved(index, shape))
    read = needed = 0
    for own in boxes.values():
        needed += sum(map(box_size, own))
        read += sum(chunk.size for chunk in chunks if any(intersection(box, chunk.bounds) for box in own))
    return read > _NOTICEABLE * needed


@dataclasses.dataclass(frozen=True)
class Deal:
    """Which device takes each chunk of an array in: devices have the same number of slots, some of them empty."""

    sharding: NamedSharding
    """Of [slots, numbers of a chunk], each device's own slots."""
    shape: tuple[int, int]
    slots: tuple[int, ...]
    """Of the chunks, in order."""


class Dealer:
    """Deals chunks to the devices of a mesh so that their processes read equally many bytes.

    Every process has a dealer of its own, asks it for the same arrays in the same order, and thus has the same answers.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self.bytes_read: Counter[int] = Counter()
        """By process."""

    def deal(self, chunks: Sequence[Chunk], itemsize: int) -> Deal:
        """The devices that take in the chunks of an array whose numbers have so many bytes in the file."""
        devices = self._mesh.devices.ravel().tolist()
        each = -(-len(chunks) // len(devices))
        free = defaultdict(list)
        for turn in range(each):
            for number, device in enumerate(devices):
                free[device.process_index].append(number * each + turn)
        slots = []
        for chunk in chunks:
            process = min((process for process in free if free[process]), key=lambda p: (self.bytes_read[p], p))
            self.bytes_read[process] += chunk.size * itemsize
            slots.append(free[process].pop(0))
        # Padded, because each device will get an equal part of every chunk on the way.
        numbers = max(chunk.size for chunk in chunks)
        shape = (len(devices) * each, numbers + -numbers % len(devices))
        return Deal(NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names)), shape, tuple(slots))


def placed(deal: Deal, taken: jax.Array, chunks: Sequence[Chunk], shape: Shape, sharding: NamedSharding) -> jax.Array:
    """The array of `shape` whose chunks were `taken` in as dealt, on the devices where it belongs.

    Every process of the mesh must call this for the same arrays in the same order.
    """
    numbers = chunks[0].size
    # Where chunks are parts of one index of the first axes, the last part of each may be shorter.
    parts = next((i + 1 for i, chunk in enumerate(chunks) if chunk.size < numbers), len(chunks))
    grid = len(chunks) // parts, parts * numbers
    move = jax.jit(_placed, static_argnames=("numbers", "grid", "shape", "mesh"), out_shardings=sharding)
    # One after the other: each takes room for a whole array on every device.
    return jax.block_until_ready(move(taken, np.asarray(deal.slots, np.int32), numbers, grid, shape, sharding.mesh))


def _placed(taken: jax.Array, slots: jax.Array, numbers: int, grid: tuple[int, int], shape: Shape, mesh: Mesh):
    def spread(x: jax.Array, *axes: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    # From whole chunks on some devices to a part of every chunk on each: empty slots go no further. Then the array is
    # whole on every device, which is what XLA would make of most reshapes in any case, with a warning.
    chunks = spread(spread(taken, None, mesh.axis_names)[slots])
    return chunks[:, :numbers].reshape(grid)[:, : math.prod(shape) // grid[0]].reshape(shape)


def stack(arrays: Sequence[jax.Array], sharding: NamedSharding) -> jax.Array:
    """The arrays of all layers as one, on the devices where it belongs."""
    return jax.jit(_stack, out_shardings=sharding)(tuple(arrays))


def _stack(arrays: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack(arrays)
