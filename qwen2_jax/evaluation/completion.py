"""Many prompts continued until a stop string, the end of text, or a number of tokens, in batches of few shapes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.config import Qwen2Config
from qwen2_jax.evaluation.memory import Room, room_for
from qwen2_jax.evaluation.score_plan import Shape, merge_shapes
from qwen2_jax.generation import Generation, bucket
from qwen2_jax.layers import Options
from qwen2_jax.model import Params
from qwen2_jax.sampling import Sampling
from qwen2_jax.tokenizer import StreamDecoder, Tokenizer

SHAPES = 3
"""Most shapes of batches, unless told otherwise; each is two programs, for the prompt and for the answer."""

_MOST_ROWS = 64
"""More rows wait longer for the last of them than they gain."""

_STEP = 16
"""Tokens between two looks for stop strings."""


class Prompt(NamedTuple):
    tokens: Sequence[int]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    """The answer ends before the first of these; empty ones are ignored."""


@dataclasses.dataclass
class Answered:
    """What completing took."""

    tokens: int = 0
    """Of prompts."""
    slots: int = 0
    """Of prompts, padding included."""
    new_tokens: int = 0
    unstopped: int = 0
    """Answers that reached their number of tokens before any of their stop strings, or the end of text."""
    shapes: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
    """Of the pairs of programs that ran."""

    @property
    def padding(self) -> float:
        """The share of the prompts' slots that were computed for nothing."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


class Completer:
    """Continues prompts as text, and counts what that took (`work`)."""

    def __init__(
        self,
        config: Qwen2Config,
        params: Params,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        options: Options = Options(),
        dtype: jax.typing.DTypeLike | None = None,
        max_rows: int | None = None,
        multiple: int = 1,
        shapes: int = SHAPES,
        room: Room | None = None,
    ):
        """
        Args:
          config: the model.
          params: its parameters; per layer is faster.
          tokenizer: of the answers.
          eos_ids: an answer ends with the first of these.
          pad_id: an id that fills rows.
          sampling: how tokens are chosen.
          seed: of random choices; batch i takes seed + i.
          options: how to compute.
          dtype: of activations and cache; the embedding's by default.
          max_rows: most rows of a batch; as many as memory has room for by default.
          multiple: what numbers of rows are rounded up to, the devices that batches are split over.
          shapes: most shapes of batches of one call of `texts`.
          room: how many tokens a batch may have; found out from the memory that is free at first by default.
        """
        self.config, self.params, self.tokenizer, self.options = config, params, tokenizer, options
        self.eos_ids, self.pad_id, self.sampling, self.seed = tuple(eos_ids), pad_id, sampling, seed
        self.dtype = jnp.dtype(dtype or params["embed"]["embedding"].dtype)
        self.max_rows, self.multiple, self.shapes = max_rows, multiple, shapes
        self.work = Answered()
        self._room = room

    def texts(self, prompts: Sequence[Prompt], shapes: int | None = None) -> Iterator[tuple[int, str]]:
        """Yields the index of each prompt with its answer, as they are finished; control tokens are no part of it.

        `shapes` is the most shapes of batches, if others than the completer's.

        Raises:
          ValueError: as `qwen2_jax.generation.generate`.
        """
        if not prompts:
            return
        if self._room is None:
            self._room = room_for(self.config, self.params, self.dtype, self.options, self.multiple)
        room = self._room
        shape_of = [Shape(bucket(len(prompt.tokens)), bucket(prompt.max_new_tokens)) for prompt in prompts]
        counts = {shape: shape_of.count(shape) for shape in set(shape_of)}
        merged = merge_shapes(counts, shapes or self.shapes)
        batch = 0
        for shape in sorted(set(merged.values()), key=sum, reverse=True):
            members = [index for index, own in enumerate(shape_of) if merged[own] == shape]
            # Those that may take longest together, so that few rows wait for others.
            members.sort(key=lambda index: (-prompts[index].max_new_tokens, -len(prompts[index].tokens)))
            rows = max(1, min(room.cached // sum(shape), self.max_rows or _MOST_ROWS * self.multiple, len(members)))
            rows = -(-len(members) // -(-len(members) // rows))
            rows = -(-rows // self.multiple) * self.multiple
            for first in range(0, len(members), rows):
                part = members[first : first + rows]
                texts = self._answer([prompts[index] for index in part], shape, rows, room, self.seed + batch)
                yield from zip(part, texts, strict=True)
                batch += 1

    def _answer(self, prompts: Sequence[Prompt], shape: Shape, rows: int, room: Room, seed: int) -> list[str]:
        slots, answer = shape
        # Rows that are missing are prompts of one token, which end after another one.
        tokens = np.zeros((rows, slots), np.int32)
        lengths, limits = np.ones(rows, np.int32), np.ones(rows, np.int32)
        for index, prompt in enumerate(prompts):
            tokens[index, : len(prompt.tokens)] = prompt.tokens
            lengths[index], limits[index] = len(prompt.tokens), prompt.max_new_tokens
        # Pieces of one length: a last one that is mostly padding costs as much as the others.
        pieces = -(-rows * slots // room.slots)
        chunk = None if pieces == 1 else -(-slots // (16 * pieces)) * 16
        run = Generation(
            *(self.config, self.params, tokens, lengths),
            max_new_tokens=limits.tolist(),
            sampling=self.sampling,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            seed=seed % 2**31,
            prefill_chunk=chunk,
            slots=slots,
            room=answer,
            options=self.options,
            dtype=self.dtype,
        )
        self.work.tokens += sum(len(prompt.tokens) for prompt in prompts)
        self.work.slots += rows * slots
        self.work.shapes.add((rows, shape, chunk))
        answers = [_Answer(self.tokenizer, prompt, self.eos_ids) for prompt in prompts]
        ended = np.ones(rows, bool)
        while not run.done:
            ended[: len(prompts)] = [one.ended for one in answers]
            if ended.all():
                break
            new = run.advance(_STEP, ended)
            for one, ids in zip(answers, new, strict=False):
                one.add(ids.tolist())
        self.work.new_tokens += sum(one.count for one in answers)
        self.work.unstopped += sum(not one.stopped for one in answers)
        return [one.text for one in answers]


class _Answer:
    """One row's answer, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, eos_ids: tuple[int, ...]):
        self._decoder = StreamDecoder(tokenizer, control_tokens=False)
        self._stops = tuple(filter(None, prompt.stops))
        # Control tokens are no part of the text, so those among the stop strings are looked for by their ids.
        ids = (tokenizer.control_id(stop) for stop in self._stops)
        self._eos_ids = {*eos_ids, *(id for id in ids if id is not None)}
        self._left = prompt.max_new_tokens
        self.text, self.count = "", 0
        self.stopped = False

    @property
    def ended(self) -> bool:
        return self.stopped or self._left == 0

    def add(self, ids: Sequence[int]) -> None:
        if self.ended:
            return
        ids = ids[: self._left]
        ends = [index for index, id in enumerate(ids) if id in self._eos_ids]
        if ends:
            ids = ids[: ends[0] + 1]
        self.count += len(ids)
        self._left -= len(ids)
        self.text += self._decoder.add(ids)
        if ends or self._left == 0:
            self.text += self._decoder.finish()
        self.stopped = bool(ends) or any(stop in self.text for stop in self._stops)
        self.text = cut_at_stops(self.text, self._stops)


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the stop strings, which are looked for one after the other, as the evaluation harness does."""
    for stop in filter(None, stops):
        text = text.split(stop, 1)[0]
    return text
