"""How many bytes an array takes in a device's memory."""

import functools
import itertools
import math

_LANES, _SUBLANES = 128, 8


@functools.cache
def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """On a TPU, in the layout that XLA gives an array by itself.

    The last two dims of a layout come in tiles of 8 x 128, or of 2 or 4 x 128 where there are no more than that. XLA
    puts there the two dims that leave least of the tiles empty. (Seen in what libtpu 0.0.41 and 0.0.50 compile.)
    """
    if not shape:
        return itemsize
    if len(shape) == 1:
        return _rounded(shape[0], 1024 if shape[0] > 1024 else _LANES) * itemsize
    least = min(
        _rounded(shape[minor], _LANES) * _sublanes(shape[second], itemsize) / (shape[minor] * shape[second])
        for minor, second in itertools.permutations(range(len(shape)), 2)
    )
    return round(math.prod(shape) * least) * itemsize


def _sublanes(size: int, itemsize: int) -> int:
    if size >= _SUBLANES:
        return _rounded(size, _SUBLANES)
    packed = 4 // itemsize if itemsize < 4 else 1  # narrow numbers share a sublane
    return max(1 << (size - 1).bit_length(), packed)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
