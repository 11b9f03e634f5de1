"""Which prompts are continued together: in few shapes of batches, what they begin with read once for all of them.

Arithmetic on the host, without JAX. The examples before a hundred questions are read once in each batch, where that
saves enough; what follows is each prompt's own.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen2_jax.evaluation.shapes import merge_shapes
from qwen2_jax.evaluation.sharing import shared_prefixes, token_order
from qwen2_jax.generation import bucket

_MOST_ROWS = 64
"""More rows wait longer for the last of them than they gain."""

_WORTH_SHARING = 0.2
"""Of all tokens of prompts: behind a prefix, attention takes paths that are slower than those of whole prompts."""


class Shape(NamedTuple):
    """Slots of a row of a batch."""

    prefix: int
    """0 for rows that share nothing."""
    suffix: int
    answer: int


class Row(NamedTuple):
    prompt: int
    """Which one."""
    shared: int
    """Length of the prefix."""
    group: int
    """Rows of one group have the same prefix; -1 for those that have none."""


@dataclasses.dataclass(frozen=True)
class Batch:
    shape: Shape
    rows: tuple[Row, ...]

    @property
    def prefixes(self) -> int:
        return len({row.group for row in self.rows} - {-1})


class Sizes(NamedTuple):
    """Of all batches of one shape, so that they share their programs."""

    prefixes: int
    rows: int


@dataclasses.dataclass(frozen=True)
class CompletionPlan:
    batches: tuple[Batch, ...]
    sizes: dict[Shape, Sizes]

    @property
    def slots(self) -> int:
        """Tokens of prompts that are computed, padding included."""
        return sum(self._slots(batch.shape) for batch in self.batches)

    def _slots(self, shape: Shape) -> int:
        sizes = self.sizes[shape]
        return sizes.prefixes * shape.prefix + sizes.rows * shape.suffix

    def cost(self, step: int) -> int:
        """In tokens of prompts, if a step of a batch takes as long as `step` of them, and more by one for each row."""
        answers = sum(batch.shape.answer * (step + self.sizes[batch.shape].rows) for batch in self.batches)
        return self.slots + answers


def plan_completions(
    prompts: Sequence[tuple[Sequence[int], int]],
    *,
    cached: int,
    shapes: int,
    step: int,
    share: bool = True,
    max_rows: int | None = None,
    multiple: int = 1,
) -> CompletionPlan:
    """How to continue each prompt.

    Args:
      prompts: token ids, at least one, and the most tokens of the answer.
      cached: tokens whose keys and values a batch may hold, unless a single row has more.
      shapes: most shapes.
      step: tokens that take as long to read as all weights, as every token of an answer does once more.
      share: whether beginnings may be read once for several prompts.
      max_rows: most rows of a batch.
      multiple: numbers of rows and prefixes are multiples of this, devices that a batch is split over.
    """
    most = max_rows or _MOST_ROWS * multiple
    alone = [Row(index, 0, -1) for index in range(len(prompts))]
    apart = _in_batches(prompts, alone, cached, shapes, step, most, multiple)
    if not share:
        return apart
    together = _in_batches(prompts, _shared(prompts), cached, shapes, step, most, multiple)
    saved = apart.cost(step) - together.cost(step)
    return together if saved >= _WORTH_SHARING * apart.slots and len(together.sizes) <= shapes else apart


def _shared(prompts: Sequence[tuple[Sequence[int], int]]) -> list[Row]:
    tokens = [np.asarray(prompt, np.int32) for prompt, _ in prompts]
    order = sorted(range(len(tokens)), key=lambda index: token_order(tokens[index]))
    # The answer's first token follows from the suffix.
    groups = shared_prefixes([(tokens[index], len(tokens[index]) - 1) for index in order])
    return [
        Row(order[place], shared, group if shared else -1)
        for group, (shared, places) in enumerate(groups)
        for place in places
    ]


def _in_batches(
    prompts: Sequence[tuple[Sequence[int], int]],
    rows: Sequence[Row],
    cached: int,
    limit: int,
    step: int,
    max_rows: int,
    multiple: int,
) -> CompletionPlan:
    def room(shapes: np.ndarray) -> np.ndarray:
        """Rows of a batch, each with its prefix once more."""
        return np.clip(cached // (shapes.sum(-1) + shapes[..., 0]), 1, max_rows)

    def cost(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """As `CompletionPlan.cost`, with one prefix in each batch."""
        batches = -(-counts // room(shapes))
        return batches * (shapes[..., 0] + step * shapes[..., 2]) + counts * shapes[..., 1:].sum(-1)

    rounded: dict[Shape, list[Row]] = defaultdict(list)
    for row in rows:
        tokens, most = prompts[row.prompt]
        prefix = bucket(row.shared) if row.shared else 0
        rounded[Shape(prefix, bucket(len(tokens) - row.shared), bucket(most))].append(row)
    merged = merge_shapes({shape: len(members) for shape, members in rounded.items()}, limit, cost)
    batches: list[Batch] = []
    sizes: dict[Shape, Sizes] = {}
    # The largest first: what runs out of memory does so at once.
    for shape in sorted(set(merged.values()), key=sum, reverse=True):
        members = [row for own, found in rounded.items() if merged[own] == shape for row in found]
        # Those that may take longest together, so that few rows wait for others.
        members.sort(key=lambda row: (-prompts[row.prompt][1], row.group, -len(prompts[row.prompt][0])))
        count = -(-len(members) // int(room(np.array(shape))))
        size = _up(-(-len(members) // count), multiple)
        of_shape = [Batch(shape, tuple(members[first : first + size])) for first in range(0, len(members), size)]
        sizes[shape] = Sizes(_up(max(batch.prefixes for batch in of_shape), multiple), size)
        batches += of_shape
    return CompletionPlan(tuple(batches), sizes)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
