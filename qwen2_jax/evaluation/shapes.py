"""Few shapes for batches of many lengths: arithmetic on the host, without JAX."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from qwen2_jax.generation import bucket

S = TypeVar("S", bound=NamedTuple)


def slots_for(length: int) -> int:
    """What rows of so many tokens are padded to; nothing takes nothing."""
    return bucket(length) if length else 0


def up_to_multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def merge_shapes(rows: Mapping[S, int], limit: int, cost: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> dict[S, S]:
    """For each shape one that holds it: of at most `limit`, or fewer where that costs less.

    Shapes with a prefix, which is their first number, and without one stay apart, so with both kinds there are at least
    two.

    Args:
      rows: how many each shape has.
      limit: most shapes.
      cost: of shapes [..., n] with so many rows [...].
    """
    known = sorted(rows)
    shapes: np.ndarray = np.array(known)
    counts = np.array([rows[shape] for shape in known])
    plain = shapes[:, 0] == 0
    alive = np.ones(len(known), bool)
    own = cost(shapes, counts).astype(np.float64)
    into = np.arange(len(known))

    def more(index: int) -> np.ndarray:
        """What it costs to merge a shape with each of the others."""
        joined = cost(np.maximum(shapes[index], shapes), counts[index] + counts)
        possible = alive & (plain == plain[index]) & (np.arange(len(known)) != index)
        return np.where(possible, joined - own[index] - own, np.inf)

    table = np.stack([more(index) for index in range(len(known))])
    for left in range(len(known), 1, -1):
        first, second = map(int, np.unravel_index(np.argmin(table), table.shape))
        if table[first, second] == np.inf or (left <= limit and table[first, second] >= 0):
            break
        shapes[first] = np.maximum(shapes[first], shapes[second])
        counts[first] += counts[second]
        own[first] = cost(shapes[first], counts[first])
        alive[second] = False
        into[into == second] = first
        table[second], table[:, second] = np.inf, np.inf
        table[first] = more(first)
        table[:, first] = table[first]
    return {shape: shape._make(shapes[into[index]].tolist()) for index, shape in enumerate(known)}
