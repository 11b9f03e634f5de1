"""Full rows of shuffled documents, and mixtures of them: every row a pure function of the seed and its number.

The documents of a source, in an order of its own for every epoch, make one stream of tokens without an end, cut into
rows of T tokens. So nothing is padded and nothing is dropped: a document that does not fit goes on in the next row, and
the row in which an epoch ends is filled up with the beginning of the next. Then rows are shuffled among their
neighbors, or a batch would hold little else than one long document.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from convert.files import shown
from train.data.batches import Rows
from train.data.shuffle import Permutation
from train.data.source import Source
from train.data.store import TokenStore
from train.loss import IGNORE
from train.pretraining import Batch

_BLOCK = 1024  # documents of an order that are looked up together
_BLOCKS = 32  # blocks whose lengths are summed up at a time: bounds the memory that an epoch's beginning takes
_WINDOW = 10_000  # rows that are shuffled among each other, unless an epoch has fewer
_SHARES = 10_000  # rows within which every mixture keeps its proportions

_ORDER, _MIXTURE, _ROWS = 1, 2, 3  # keys of what is drawn, so that no two draws are alike
_VERSION = 2  # of how text becomes rows: another one must not go on with a run amid its rows


def packed_rows(sources: Sequence[Source], seq: int, seed: int) -> Rows:
    """Rows of `seq` tokens, from each source in proportion to its weight, without padding. The last place of every
    segment has no target; segments are numbered from 1, and positions count from 0 in each.

    Raises:
      ValueError: for no sources, weights that are not positive, a row longer than all documents of a source, a negative
        seed.
    """
    if not sources:
        raise ValueError("there is no training data; name at least one source")
    if seq < 2:
        raise ValueError(f"rows must have at least 2 tokens, one to read and one to predict, got {seq}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")
    for source in sources:
        if not 0 < source.weight < float("inf"):
            raise ValueError(f"the weight of {shown(source.store.folder)} must be positive, got {source.weight}")
        if source.store.tokens < seq:
            raise ValueError(
                f"{shown(source.store.folder)} has {source.store.tokens} tokens in all, fewer than the {seq} of one "
                "row; take shorter rows, or more data"
            )
    if sum(source.weight for source in sources) == float("inf"):
        raise ValueError("the weights are too large to be added up; only their proportions matter, give smaller ones")
    rows = [PackedRows(source.store, seq, seed) for source in sources]
    return rows[0] if len(rows) == 1 else Mixture(rows, [source.weight for source in sources], seed)


class PackedRows:
    """Rows of one source. Safe for use from several threads."""

    def __init__(self, store: TokenStore, seq: int, seed: int):
        self._store, self._seq = store, seq
        # By content, so that neither a source's path nor the others in a mixture matter to its order.
        self._key = seed, int(store.digest[:16], 16)
        self._order = functools.lru_cache(2)(lambda epoch: Order(store, *self._key, epoch))
        self._window = min(_WINDOW, store.tokens // seq)  # at most an epoch: no text twice before all of it once
        self._shuffle = functools.lru_cache(8)(lambda window: Permutation(self._window, _ROWS, *self._key, window))

    @property
    def digest(self) -> str:
        return f"{_VERSION}:{self._store.digest}"

    def described(self, count: int) -> str:
        times = count * self._seq / self._store.tokens
        return f"{len(self._store):,} documents, {self._store.tokens:,} tokens, read {times:.2g} times"

    def __getitem__(self, index: int) -> Batch:
        pieces, lengths = [], []
        epoch, begin = divmod(self.origin(index) * self._seq, self._store.tokens)
        left = self._seq
        while left:
            for document, skipped, length in self._order(epoch).documents(begin):
                count = min(length - skipped, left)
                pieces.append(self._store.read(document, skipped, count))
                lengths.append(count)
                left -= count
                if not left:
                    break
            epoch, begin = epoch + 1, 0
        return _row(np.concatenate(pieces), np.array(lengths))

    def origin(self, index: int) -> int:
        """Which row of the stream is row `index`: that of tokens origin * T up to (origin + 1) * T."""
        window, place = divmod(index, self._window)
        return window * self._window + int(self._shuffle(window)(np.array([place]))[0])


class Order:
    """One epoch of one source: its documents, shuffled.

    Holds the sums of lengths at every 1024th document only: 8 bytes for 1024 documents. Making one reads all lengths.
    """

    def __init__(self, store: TokenStore, *key: int):
        self._store = store
        self._permutation = Permutation(len(store), _ORDER, *key)
        self._count = len(store)
        sums = [np.zeros(1, np.int64)]
        for begin in range(0, self._count, _BLOCK * _BLOCKS):
            lengths = self._store.lengths(self._at(begin, begin + _BLOCK * _BLOCKS))
            sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), _BLOCK)))
        self._begins = np.cumsum(np.concatenate(sums))
        """Of each block, in tokens of the epoch; and the epoch's end."""
        # As many as the rows of a window may need, in any order; 24 kB each.
        self._block = functools.lru_cache(512)(self._look_up)

    def documents(self, begin: int) -> Iterator[tuple[int, int, int]]:
        """From the one with token `begin` of the epoch on: number, tokens of it before `begin`, and length."""
        first = int(np.searchsorted(self._begins, begin, side="right")) - 1
        for block in range(first, len(self._begins) - 1):
            documents, lengths, begins = self._block(block)
            start = 0 if block > first else int(np.searchsorted(begins, begin, side="right")) - 1
            skipped = 0 if block > first else begin - int(begins[start])
            for place in range(start, len(documents)):
                yield int(documents[place]), skipped, int(lengths[place])
                skipped = 0

    def _look_up(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        documents = self._at(block * _BLOCK, (block + 1) * _BLOCK)
        lengths = self._store.lengths(documents)
        return documents, lengths, self._begins[block] + np.cumsum(lengths) - lengths

    def _at(self, begin: int, end: int) -> np.ndarray:
        return self._permutation(np.arange(begin, min(end, self._count), dtype=np.int64))


class Mixture:
    """Rows of several sources, in proportion to their weights: exactly so in every run of 10,000 from a multiple of it
    on, to the nearest row, and shuffled within it."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], seed: int):
        """
        Raises:
          ValueError: if a weight is so small that it comes to no row of 10,000.
        """
        self._sources, self._seed = sources, seed
        self.shares = _shares(weights)
        """Rows of each source in 10,000."""
        self._ends = [*itertools.accumulate(self.shares)]
        self._shuffle = functools.lru_cache(8)(lambda block: Permutation(_SHARES, _MIXTURE, seed, block))

    @property
    def digest(self) -> str:
        return " ".join(source.digest for source in self._sources)

    def described(self, count: int) -> str:
        shares = [count * share // _SHARES for share in self.shares]
        return ", and ".join(source.described(share) for source, share in zip(self._sources, shares, strict=True))

    def __getitem__(self, index: int) -> Batch:
        source, number = self.origin(index)
        return self._sources[source][number]

    def origin(self, index: int) -> tuple[int, int]:
        """Which source row `index` is from, and which of its rows it is."""
        block, place = divmod(index, _SHARES)
        drawn = int(self._shuffle(block)(np.array([place]))[0])
        source = next(source for source, end in enumerate(self._ends) if drawn < end)
        share = self.shares[source]
        return source, block * share + drawn - (self._ends[source] - share)


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, by largest remainder, that sum up to _SHARES."""
    total = sum(weights)
    exact = [weight / total * _SHARES for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: _SHARES - sum(shares)]:
        shares[k] += 1
    if min(shares) == 0:
        least = min(range(len(weights)), key=lambda k: weights[k])
        raise ValueError(
            f"source {least + 1} of the mixture has weight {weights[least]:g} of {total:g}, less than one row "
            f"in {_SHARES}; give it more, or leave it out"
        )
    return shares


def _row(tokens: np.ndarray, lengths: np.ndarray) -> Batch:
    """A row of segments of these lengths [n], each array [T] int32."""
    ends = np.cumsum(lengths)
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    positions = np.arange(len(tokens), dtype=np.int32) - np.repeat(ends - lengths, lengths).astype(np.int32)
    targets = np.roll(tokens, -1)
    targets[ends - 1] = IGNORE
    return Batch(tokens, targets, segments, positions)
