"""A digest of an array that does not depend on where its parts are: a sum over its numbers, so that devices and readers
of files can each take the parts that they have, in any order.

Each number's bits, together with its place, go through a mixing function into uint32, and the results are summed modulo
2^32, twice with different functions. For one place the function is a bijection of the bits, so a change of one number
always changes both sums; other changes go unnoticed with a probability of 2^-64. Shape and dtype are not part of it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Multipliers of a number's row and column (all odd), then shift, multiply, shift, multiply, shift: the finalizers
# "lowbias32" (Wellons, Prospecting for hash functions) and that of MurmurHash3.
_LANES = (
    (0x9E3779B1, 0x85EBCA77, (16, 0x7FEB352D, 15, 0x846CA68B, 16)),
    (0xC2B2AE3D, 0x27D4EB2F, (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)),
)
_BLOCK = 1 << 16  # numbers mixed at a time: intermediate results that stay in the processor's cache


def mixed(bits: Any, rows: Any, columns: Any) -> list[Any]:
    """The two mixed numbers for each of `bits`, before they are summed.

    Args:
      bits: uint32, of numpy or JAX: each number's own bits, zeros in front.
      rows: uint32, broadcastable to `bits`: the place along all axes but the last, counted in C order, modulo 2^32.
      columns: uint32, likewise: the place along the last axis.
    """
    lanes = []
    for row, column, (first, multiplier, second, other, third) in _LANES:
        x = bits + (rows * np.uint32(row) + columns * np.uint32(column))
        x = (x ^ (x >> np.uint32(first))) * np.uint32(multiplier)
        x = (x ^ (x >> np.uint32(second))) * np.uint32(other)
        lanes.append(x ^ (x >> np.uint32(third)))
    return lanes


class Digest:
    """The digest of an array that is read box by box.

    Args:
      shape: of the whole array.
    """

    def __init__(self, shape: Sequence[int]):
        self._shape = tuple(shape) or (1,)
        self._sums = [0, 0]

    def add(self, numbers: np.ndarray, start: Sequence[int]) -> None:
        """Takes in a box of the array whose first number is at index `start`. Every number must be in one box."""
        start = tuple(start) or (0,)
        box = numbers.shape or (1,)
        bits = np.ascontiguousarray(numbers).reshape(-1, box[-1]).view(f"u{numbers.itemsize}")
        rows = np.zeros((1,) * (len(box) - 1), np.uint64)
        for axis in range(len(box) - 1):
            along = np.arange(start[axis], start[axis] + box[axis], dtype=np.uint64)
            stride = np.uint64(math.prod(self._shape[axis + 1 : -1]))
            rows = rows + (along * stride).reshape(-1, *(1,) * (len(box) - 2 - axis))
        rows = rows.reshape(-1, 1).astype(np.uint32)
        columns = np.arange(start[-1], start[-1] + box[-1], dtype=np.uint32)[None]
        step = max(1, _BLOCK // box[-1])
        for first in range(0, len(bits), step):
            block = bits[first : first + step].astype(np.uint32)
            for lane, numbers_of_lane in enumerate(mixed(block, rows[first : first + step], columns)):
                self._sums[lane] += int(numbers_of_lane.sum(dtype=np.uint32))

    def text(self) -> str:
        return as_text(self._sums)


def as_text(sums: Sequence[int]) -> str:
    """Both sums as 16 hexadecimal digits, as in manifests."""
    return "".join(f"{int(value) % 2**32:08x}" for value in sums)
