"""A shuffle that is a function: the document at any place of it, without the others."""

import numpy as np

_ROUNDS = 8
_SMALL = 1 << 12  # below, a network is not fair: it makes some permutations more often than others
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


class Permutation:
    """Of the numbers below `size`, by key. Takes next to no memory, whatever the size.

    A Feistel network over the next power of two, followed until it is back below `size`, two steps on average at most;
    small ones are sorted by random numbers. The rounds' function is that of splitmix64, the keys are of NumPy's
    SeedSequence: both are the same everywhere.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002, section 4 (cycle walking).
    """

    def __init__(self, size: int, *key: int):
        """
        Args:
          size: at least 1, below 2^62.
          key: numbers that are not negative.
        """
        assert 0 < size < 1 << 62
        bits = max(2, (size - 1).bit_length())
        self.size = size
        self._low = np.uint64(bits // 2)
        self._masks = tuple(np.uint64((1 << width) - 1) for width in (bits // 2, bits - bits // 2))
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
        self._table: np.ndarray | None = None
        if size <= _SMALL:
            numbers = _mixed(_mixed(np.arange(size, dtype=np.uint64), self._keys[0]), self._keys[1])
            self._table = np.argsort(numbers, kind="stable").astype(np.int64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at `places` [n], each below the size; int64 [n]."""
        if self._table is not None:
            return self._table[places]
        numbers = self._once(places.astype(np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._once(numbers[outside])
        return numbers.astype(np.int64)

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        low, high = numbers & self._masks[0], numbers >> self._low
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= _mixed(high, key) & self._masks[0]
            else:
                high ^= _mixed(low, key) & self._masks[1]
        return (high << self._low) | low


def _mixed(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 bits of which every one depends on all bits of the number and of the key."""
    mixed = (numbers + key) * _MIX[0]
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIX[1]
    return mixed ^ (mixed >> np.uint64(31))
