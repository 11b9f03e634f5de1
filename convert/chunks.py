"""How an array is cut into the chunks that are read, checked and written as a whole."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from convert.boxes import Bounds
from convert.names import Array, Shape
from qwen2_jax.config import Qwen2Config

CHUNK_BYTES = 32 << 20
"""Large enough that the cost per file vanishes, small enough that several fit into a few hundred megabytes."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of an array that is one run of consecutive numbers: [start, stop) of the flattened array."""

    key: tuple[int, ...]
    """Position in the grid of chunks, one number per axis."""
    box: tuple[slice, ...]
    start: int
    stop: int

    @property
    def shape(self) -> Shape:
        return tuple(side.stop - side.start for side in self.box)

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def bounds(self) -> Bounds:
        return tuple((side.start, side.stop) for side in self.box)


def chunk_shape(shape: Shape, itemsize: int, limit: int = CHUNK_BYTES) -> Shape:
    """The shape of an array's chunks: whole indices of the first axis if one fits into `limit` bytes, else parts of one
    index, and so on. Sizes are evened out, so that the last chunk is nearly as large as the others."""
    for axis, size in enumerate(shape):
        inner = shape[axis + 1 :]
        fit = limit // (math.prod(inner) * itemsize)
        if fit or not inner:
            parts = math.ceil(size / max(fit, 1))
            return (1,) * axis + (math.ceil(size / parts), *inner)
    raise AssertionError("an array has at least one axis")


def is_chunk_shape(shape: Shape, chunk: object) -> bool:
    """Whether `chunk`, read from a file, is as `chunk_shape` makes it for `shape`: ones, a cut axis, whole axes."""
    if not isinstance(chunk, list) or len(chunk) != len(shape):
        return False
    if not all(type(side) is int and 1 <= side <= whole for side, whole in zip(chunk, shape, strict=True)):
        return False
    cut = _cut_axis(chunk)
    return tuple(chunk[cut + 1 :]) == shape[cut + 1 :]


def _cut_axis(chunk: Sequence[int]) -> int:
    return next((axis for axis, side in enumerate(chunk) if side != 1), len(chunk) - 1)


def chunks_of(shape: Shape, chunk: Shape) -> Iterator[Chunk]:
    """The chunks of shape `chunk` (the last one may be shorter) that make up an array of `shape`, in order.

    `chunk` must be as `chunk_shape` makes it: ones, one axis that is cut, then whole axes.
    """
    axis = _cut_axis(chunk)
    inner = math.prod(shape[axis + 1 :])
    for outer in np.ndindex(*shape[:axis]):
        base = int(np.ravel_multi_index(outer, shape[:axis])) * shape[axis] if outer else 0
        for part, low in enumerate(range(0, shape[axis], chunk[axis])):
            high = min(low + chunk[axis], shape[axis])
            box = (*(slice(i, i + 1) for i in outer), slice(low, high), *(slice(0, side) for side in shape[axis + 1 :]))
            key = (*outer, part, *(0 for _ in shape[axis + 1 :]))
            yield Chunk(key, box, (base + low) * inner, (base + high) * inner)


def fill(out: np.ndarray, start: int, chunks: Sequence[Chunk], read: Callable[[Chunk, np.ndarray], None]) -> None:
    """Fills `out` (flat) with an array's numbers from `start` on, reading each chunk that it meets as a whole.

    Args:
      chunks: of the array.
      read: fills flat memory with all numbers of a chunk.
    """
    stop = start + out.size
    for chunk in chunks:
        low, high = max(start, chunk.start), min(stop, chunk.stop)
        if low >= high:
            continue
        whole = (low, high) == (chunk.start, chunk.stop)
        numbers = out[low - start : high - start] if whole else np.empty(chunk.stop - chunk.start, out.dtype)
        read(chunk, numbers)
        if not whole:
            out[low - start : high - start] = numbers[low - chunk.start : high - chunk.start]


class Source(Protocol):
    """A checkpoint of any kind, open for reading from any number of threads."""

    config: Qwen2Config
    arrays: dict[str, Array]
    """By dotted path of the per-layer tree."""
    dtypes: dict[str, np.dtype]

    def chunks(self, path: str) -> list[Chunk]:
        """The runs in which array `path` is best read: each checked and read from the disk once."""
        ...

    def read(self, path: str, start: int, out: np.ndarray) -> None:
        """Fills `out` (flat, of the array's dtype) with its numbers from `start` on.

        Raises:
          ValueError: if the file is truncated, changed since it was opened, or not what its digest says.
          OSError: if it cannot be read.
        """
        ...


class FolderSource(Source, Protocol):
    """A source whose numbers come from the checkpoint in `folder`."""

    folder: Path
