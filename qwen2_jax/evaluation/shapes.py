"""Few shapes for batches of many lengths: arithmetic on the host, without JAX."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

S = TypeVar("S", bound=NamedTuple)


def slots(shapes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What so many rows [...] of shapes [..., n] take, if a shape is numbers of slots."""
    return shapes.sum(-1) * rows


def merge_shapes(
    rows: dict[S, int], limit: int, cost: Callable[[np.ndarray, np.ndarray], np.ndarray] = slots
) -> dict[S, S]:
    """For each shape, with its number of rows, one that holds it: of at most `limit`, or fewer where that costs less.

    Shapes with a prefix, which is their first number, and without one stay apart, so with both kinds there are at least
    two.
    """
    merged = {shape: [shape] for shape in rows}
    count = dict(rows)
    while len(merged) > 1:
        known = sorted(merged)
        shapes: np.ndarray = np.array(known)
        weights = np.array([count[shape] for shape in known])
        both = np.maximum(shapes[:, None], shapes[None])
        own = cost(shapes, weights)
        more = cost(both, weights[:, None] + weights[None]) - own[:, None] - own[None]
        apart = (shapes[:, 0] == 0)[:, None] != (shapes[:, 0] == 0)[None]
        never = np.iinfo(np.int64).max
        more = np.where(apart | np.eye(len(shapes), dtype=bool), never, more)
        i, j = np.unravel_index(np.argmin(more), more.shape)
        if more[i, j] == never or (len(merged) <= limit and more[i, j] >= 0):
            break
        first, second = known[i], known[j]
        members = merged.pop(first) + merged.pop(second)
        total = count.pop(first) + count.pop(second)
        larger = first._make(both[i, j].tolist())
        merged[larger] = merged.get(larger, []) + members
        count[larger] = count.get(larger, 0) + total
    return {member: shape for shape, members in merged.items() for member in members}
