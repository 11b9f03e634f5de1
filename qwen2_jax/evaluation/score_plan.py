"""Which tokens to compute so that many continuations are scored: each shared beginning once, in few shapes of batches.

Arithmetic on the host, without JAX. Requests are cut into rows in three steps. Inputs that are the beginning of another
one disappear in it: " A" and " B" after one question need one row, which is asked for two tokens. Of the rest, those
that begin alike share a *prefix* where that saves tokens, be it the question above four answers or the examples above a
hundred questions; what follows is each one's *suffix*. Then the lengths are rounded up, and shapes merged until there
are few, where merging adds the least padding.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen2_jax.evaluation.shapes import merge_shapes, slots_for, up_to_multiple
from qwen2_jax.evaluation.sharing import common_tokens, in_batches, shared_prefixes, token_order
from qwen2_jax.generation import bucket

Tokens = Sequence[int]


class Shape(NamedTuple):
    """Slots of a row of a batch."""

    prefix: int
    """0 for rows that share nothing."""
    suffix: int


class Ask(NamedTuple):
    """One number wanted: the probability of `token` after position `position` of a row."""

    request: int
    position: int
    token: int


@dataclasses.dataclass(frozen=True)
class Row:
    tokens: np.ndarray
    """int32, prefix and suffix."""
    shared: int
    """Length of the prefix."""
    group: int
    """Rows of one group have the same prefix."""
    asks: tuple[Ask, ...]
    """At positions of the suffix."""


@dataclasses.dataclass(frozen=True)
class Batch:
    shape: Shape
    rows: tuple[Row, ...]


class Sizes(NamedTuple):
    """Of all batches of one shape, so that they share one program."""

    prefixes: int
    rows: int
    asks: int


@dataclasses.dataclass(frozen=True)
class ScorePlan:
    batches: tuple[Batch, ...]
    sizes: dict[Shape, Sizes]

    @property
    def slots(self) -> int:
        """Tokens that are computed, padding included."""
        each = {shape: size.prefixes * shape.prefix + size.rows * shape.suffix for shape, size in self.sizes.items()}
        return sum(each[batch.shape] for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Those of them that are none of padding."""
        prefixes = [{row.group: row.shared for row in batch.rows} for batch in self.batches]
        suffixes = sum(len(row.tokens) - row.shared for batch in self.batches for row in batch.rows)
        return suffixes + sum(sum(lengths.values()) for lengths in prefixes)


def plan_scores(
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    slots: int,
    cached: int,
    programs: int,
    share: bool = True,
    max_rows: int | None = None,
    multiple: int = 1,
) -> ScorePlan:
    """How to score each continuation after its context, all of them of at least one token.

    Args:
      pairs: context and continuation, token ids.
      slots: tokens of a batch, padding included, unless a single row has more.
      cached: tokens whose keys and values a batch may hold, likewise; each row holds its own copy of its prefix.
      programs: most shapes.
      share: whether beginnings may be read once for several requests.
      max_rows: most rows of a batch, at least `multiple`.
      multiple: numbers of rows and prefixes are multiples of this, devices that a batch is split over.
    """
    groups = _in_groups(pairs, share)
    rounded: dict[Shape, list[Row]] = defaultdict(list)
    for row in groups:
        rounded[Shape(slots_for(row.shared), slots_for(len(row.tokens) - row.shared))].append(row)
    merged = merge_shapes(
        {shape: len(rows) for shape, rows in rounded.items()},
        programs,
        lambda shapes, counts: shapes.sum(-1) * counts,
    )
    by_shape: dict[Shape, list[Row]] = defaultdict(list)
    for shape, rows in rounded.items():
        by_shape[merged[shape]] += rows
    batches: list[Batch] = []
    sizes: dict[Shape, Sizes] = {}
    # The largest first: what runs out of memory does so at once.
    for shape in sorted(by_shape, key=sum, reverse=True):
        rows = sorted(by_shape[shape], key=lambda row: row.group)
        of_shape = [Batch(shape, tuple(part)) for part in _cut(rows, shape, slots, cached, max_rows, multiple)]
        sizes[shape] = Sizes(
            prefixes=up_to_multiple(max(len({row.group for row in batch.rows}) for batch in of_shape), multiple),
            rows=up_to_multiple(max(len(batch.rows) for batch in of_shape), multiple),
            asks=bucket(max(sum(len(row.asks) for row in batch.rows) for batch in of_shape)),
        )
        batches += of_shape
    return ScorePlan(tuple(batches), sizes)


def _cut(
    rows: list[Row], shape: Shape, slots: int, cached: int, max_rows: int | None, multiple: int
) -> list[list[Row]]:
    """Batches of rows of one shape."""
    groups = len({row.group for row in rows})
    each = shape.suffix + shape.prefix * groups / len(rows)  # a row with its part of a prefix
    held = each + shape.prefix if shape.prefix else 0
    most = min(int(slots / each), int(cached / held) if held else len(rows), max_rows or len(rows), len(rows))
    most = max(multiple, most // multiple * multiple)
    # Where few rows share a prefix and elsewhere many, the prefixes must not outgrow the batch.
    return in_batches(rows, most, math.ceil(1.25 * min(most, len(rows)) * groups / len(rows)))


class _Input(NamedTuple):
    """Tokens that the model reads, and what is asked of it."""

    tokens: np.ndarray
    asks: tuple[Ask, ...]


def _in_groups(pairs: Sequence[tuple[Tokens, Tokens]], share: bool) -> list[Row]:
    inputs = _distinct(pairs, share)
    groups = [(0, range(index, index + 1)) for index in range(len(inputs))]
    if share:
        # The logits of what is asked for come from the suffix.
        groups = shared_prefixes([(one.tokens, min(ask.position for ask in one.asks)) for one in inputs])
    return [
        Row(inputs[index].tokens, shared, group, inputs[index].asks)
        for group, (shared, members) in enumerate(groups)
        for index in members
    ]


def _distinct(pairs: Sequence[tuple[Tokens, Tokens]], share: bool) -> list[_Input]:
    """The inputs in order, each once. If beginnings are shared, those that others begin with are left out, and these
    asked instead."""
    inputs = []
    for request, (context, continuation) in enumerate(pairs):
        tokens = np.asarray((*context, *continuation), np.int32)
        first = len(context) - 1
        asks = tuple(Ask(request, first + index, int(token)) for index, token in enumerate(continuation))
        inputs.append(_Input(tokens[:-1], asks))
    inputs.sort(key=lambda one: token_order(one.tokens))
    distinct: list[_Input] = []
    for one in inputs:
        shared = common_tokens(distinct[-1].tokens, one.tokens) if distinct else 0
        if distinct and shared == len(distinct[-1].tokens) and (share or shared == len(one.tokens)):
            distinct[-1] = _Input(one.tokens, distinct[-1].asks + one.asks)
        else:
            distinct.append(one)
    return distinct
