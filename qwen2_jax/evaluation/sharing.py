"""Which beginnings of inputs are read once, for all that begin alike: arithmetic on the host, without JAX."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

_LEAST_SHARED = 16
"""Tokens that a shared prefix has at least: reading it is a pass of its own through all weights."""


def token_order(tokens: np.ndarray) -> bytes:
    """A key for sorting: as bytes, most significant first, tokens sort as their numbers do."""
    return tokens.astype(">u4").tobytes()


def common_tokens(first: np.ndarray, second: np.ndarray) -> int:
    """With how many equal tokens both begin."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(np.argmax(differ)) if differ.any() else length


@dataclasses.dataclass
class _Span:
    """Inputs that follow each other and begin alike."""

    length: int
    """Of all inputs together."""
    own: int
    """Tokens at most that each input may share."""
    cost: int
    """Tokens to compute, shared as `groups` says."""
    groups: list[tuple[int, range]]
    """Prefix and members of each group."""


def shared_prefixes(inputs: Sequence[tuple[np.ndarray, int]]) -> list[tuple[int, range]]:
    """The groups that save most tokens: how many tokens the members of each share, 0 for one that is alone, and which.

    Inputs that begin alike form a tree, because they are sorted. From its leaves up, a span of inputs becomes one group
    with everything that they have in common as its prefix, if that is less to compute than the groups inside of it.

    Args:
      inputs: in the order of `token_order`, the tokens of each, and how many of them may be part of a prefix.
    """

    def leaf(index: int) -> _Span:
        tokens, most = inputs[index]
        return _Span(len(tokens), most, len(tokens), [(0, range(index, index + 1))])

    def closed(common: int, parts: list[_Span]) -> _Span:
        start, stop = parts[0].groups[0][1].start, parts[-1].groups[-1][1].stop
        length, own = sum(part.length for part in parts), min(part.own for part in parts)
        prefix = min(common, own)
        together = length - prefix * (stop - start - 1)
        apart = sum(part.cost for part in parts)
        if prefix >= _LEAST_SHARED and together < apart:
            return _Span(length, own, together, [(prefix, range(start, stop))])
        groups = [group for part in parts for group in part.groups]
        return _Span(length, own, apart, groups)

    if not inputs:
        return []
    open_spans: list[tuple[int, list[_Span]]] = []
    last = leaf(0)
    for index in range(1, len(inputs) + 1):
        here = common_tokens(inputs[index - 1][0], inputs[index][0]) if index < len(inputs) else -1
        while open_spans and open_spans[-1][0] > here:
            begun, parts = open_spans.pop()
            last = closed(begun, [*parts, last])
        if index == len(inputs):
            break
        if open_spans and open_spans[-1][0] == here:
            open_spans[-1][1].append(last)
        else:
            open_spans.append((here, [last]))
        last = leaf(index)
    return last.groups


class Grouped(Protocol):
    """A row of a batch."""

    @property
    def group(self) -> int:
        """Rows of one group have the same prefix."""


R = TypeVar("R", bound=Grouped)


def in_batches(rows: Sequence[R], most: int, most_prefixes: int) -> list[list[R]]:
    """Batches of at most so many rows and prefixes, about equally large. Rows of a group should stand together."""
    size = -(-len(rows) // -(-len(rows) // most))
    parts: list[list[R]] = [[]]
    seen: set[int] = set()
    for row in rows:
        if parts[-1] and (len(parts[-1]) == size or (row.group not in seen and len(seen) == most_prefixes)):
            parts.append([])
            seen = set()
        parts[-1].append(row)
        seen.add(row.group)
    return parts


def prefix_arrays(
    rows: Iterable[tuple[Sequence[int] | np.ndarray, int, int]], shape: tuple[int, int], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prefixes of a batch as arrays: tokens [P, W] and lengths [P], padded, and which one each row has, [size].

    Args:
      rows: tokens of each, how many of them are its prefix, and its group.
      shape: P and W.
      size: of the batch, with rows that are missing.
    """
    tokens, lengths, of = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32), np.zeros(size, np.int32)
    places: dict[int, int] = {}
    for index, (row, shared, group) in enumerate(rows):
        if shared:
            of[index] = place = places.setdefault(group, len(places))
            tokens[place, :shared], lengths[place] = row[:shared], shared
    return tokens, lengths, of
