"""Which prompts are continued together: in few shapes of batches, what they begin with read once for all of them.

Arithmetic on the host, without JAX. The examples before a hundred questions are read once in each batch, where that
saves enough; what follows is each prompt's own.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen2_jax.evaluation.shapes import merge_shapes, slots_for, up_to_multiple
from qwen2_jax.evaluation.sharing import in_batches, shared_prefixes, token_order

_MOST_ROWS = 64
"""More rows wait longer for the last of them than they gain."""

_WORTH_SHARING = 0.2
"""Of what reading all prompts whole costs: behind a prefix, attention takes paths that are slower than theirs."""


class Shape(NamedTuple):
    """Of a batch, in slots of a row."""

    prefix: int
    """0 for rows that share nothing."""
    suffix: int
    answer: int
    prefixes: int
    """Most prefixes of a batch."""


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
        each = {shape: size.prefixes * shape.prefix + size.rows * shape.suffix for shape, size in self.sizes.items()}
        return sum(each[batch.shape] for batch in self.batches)

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
      step: tokens of a batch that take as long to compute as all weights take to read, as every token of an answer
        makes a batch do once more.
      share: whether beginnings may be read once for several prompts.
      max_rows: most rows of a batch, at least `multiple`.
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
    members = Counter(row.group for row in rows)

    def shape_of(row: Row) -> Shape:
        tokens, most = prompts[row.prompt]
        suffix, answer = slots_for(len(tokens) - row.shared), slots_for(most)
        if not row.shared:
            return Shape(0, suffix, answer, 0)
        # As many as a batch of such groups has, and one that goes on in the next. In powers of 2, lest shapes differ by
        # little else.
        prefixes = min(max_rows, -(-max_rows // members[row.group]) + 1)
        return Shape(slots_for(row.shared), suffix, answer, 1 << (prefixes - 1).bit_length())

    def room(shapes: np.ndarray) -> np.ndarray:
        """Rows of a batch, each with its prefix once more."""
        most = np.minimum(cached // (shapes[..., :3].sum(-1) + shapes[..., 0]), max_rows)
        return np.maximum(multiple, most // multiple * multiple)

    def cost(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """As `CompletionPlan.cost`, about."""
        prefix, suffix, answer, prefixes = np.moveaxis(shapes, -1, 0)
        most = room(shapes)
        each = np.minimum(prefixes, most) * prefix + step * answer
        return -(-counts // most) * each + counts * (suffix + answer)

    rounded: dict[Shape, list[Row]] = defaultdict(list)
    for row in rows:
        rounded[shape_of(row)].append(row)
    merged = merge_shapes({shape: len(own) for shape, own in rounded.items()}, limit, cost)
    batches: list[Batch] = []
    sizes: dict[Shape, Sizes] = {}
    # The largest first: what runs out of memory does so at once.
    for shape in sorted(set(merged.values()), key=lambda shape: sum(shape[:3]), reverse=True):
        of_shape = [row for own, found in rounded.items() if merged[own] == shape for row in found]
        # Those that may take longest together, so that few rows wait for others.
        of_shape.sort(key=lambda row: (-prompts[row.prompt][1], row.group, -len(prompts[row.prompt][0])))
        parts = in_batches(of_shape, int(room(np.array(shape))), max(1, shape.prefixes))
        cut = [Batch(shape, tuple(part)) for part in parts]
        sizes[shape] = Sizes(
            prefixes=up_to_multiple(max(batch.prefixes for batch in cut), multiple),
            rows=up_to_multiple(max(len(batch.rows) for batch in cut), multiple),
        )
        batches += cut
    return CompletionPlan(tuple(batches), sizes)
