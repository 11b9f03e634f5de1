"""Boxes of arrays: what one device holds of an array, and what a file's chunk has of it."""

import math
from typing import Any

from convert.names import Shape

Bounds = tuple[tuple[int, int], ...]
"""A box of an array: (start, stop) along each axis."""


def whole(shape: Shape) -> Bounds:
    return tuple((0, side) for side in shape)


def resolved(index: Any, shape: Shape) -> Bounds:
    """The box that JAX describes by a slice for each axis."""
    return tuple(side.indices(size)[:2] for side, size in zip(index, shape, strict=True))


def box_shape(box: Bounds) -> Shape:
    return tuple(stop - start for start, stop in box)


def box_size(box: Bounds) -> int:
    return math.prod(box_shape(box))


def intersection(a: Bounds, b: Bounds) -> Bounds | None:
    sides = tuple((max(low, start), min(high, stop)) for (low, high), (start, stop) in zip(a, b, strict=True))
    return sides if all(low < high for low, high in sides) else None


def slices(inside: Bounds, of: Bounds) -> tuple[slice, ...]:
    """`inside`, counted from the beginning of the box that it is a part of."""
    return tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(inside, of, strict=True))
