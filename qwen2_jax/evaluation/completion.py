"""Many prompts continued until a stop string, the end of text, or a number of tokens, in batches of few shapes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.config import Qwen2Config
from qwen2_jax.evaluation.completion_plan import Batch, Shape, Sizes, plan_completions
from qwen2_jax.evaluation.memory import Room, pass_tokens, room_for
from qwen2_jax.evaluation.shapes import up_to_multiple
from qwen2_jax.evaluation.sharing import prefix_arrays
from qwen2_jax.generation import Generation, Prefixes
from qwen2_jax.layers import Options
from qwen2_jax.model import Params
from qwen2_jax.sampling import Sampling
from qwen2_jax.tokenizer import StreamDecoder, Tokenizer

SHAPES = 3
"""Most shapes of batches, unless told otherwise; each is two programs, for the prompt and for the answer."""

_STEP = 16
"""Tokens between two looks for stop strings."""


class Programs(NamedTuple):
    """One for prompts and one for answers, of a shape of batches."""

    shape: Shape
    sizes: Sizes
    prefix_chunk: int | None
    """Prefixes are read in pieces of so many tokens, or whole."""
    suffix_chunk: int | None
    """Likewise what follows them."""


class Prompt(NamedTuple):
    tokens: Sequence[int]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    """The answer ends before the first of these; empty ones are ignored."""


@dataclasses.dataclass
class Answered:
    """What completing took."""

    tokens: int = 0
    """Of prompts, without padding; a shared beginning counts once in every batch."""
    slots: int = 0
    """Of prompts, padding included."""
    new_tokens: int = 0
    unstopped: int = 0
    """Answers that reached their number of tokens before any of their stop strings, or the end of text."""
    programs: set[Programs] = dataclasses.field(default_factory=set)
    """The pairs that ran."""

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
        share: bool = True,
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
          share: whether to read shared beginnings once.
          room: how many tokens a batch may have; found out from the memory that is free at first by default.
        """
        self.config, self.params, self.tokenizer, self.options = config, params, tokenizer, options
        self.eos_ids, self.pad_id, self.sampling, self.seed = tuple(eos_ids), pad_id, sampling, seed
        self.dtype = jnp.dtype(dtype or params["embed"]["embedding"].dtype)
        self.max_rows, self.multiple, self.shapes = max_rows, multiple, shapes
        self.work = Answered()
        self.share = share and not config.reads_by_prompt_length
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
        plan = plan_completions(
            [(prompt.tokens, prompt.max_new_tokens) for prompt in prompts],
            cached=self._room.cached,
            shapes=shapes or self.shapes,
            step=pass_tokens(self.params) * self.multiple,
            share=self.share,
            max_rows=self.max_rows,
            multiple=self.multiple,
        )
        for number, batch in enumerate(plan.batches):
            texts = self._answer(prompts, batch, plan.sizes[batch.shape], self._room, self.seed + number)
            yield from zip((row.prompt for row in batch.rows), texts, strict=True)

    def _answer(self, prompts: Sequence[Prompt], batch: Batch, sizes: Sizes, room: Room, seed: int) -> list[str]:
        shape, own = batch.shape, [prompts[row.prompt] for row in batch.rows]
        # Rows that are missing have one token (behind some prefix, if there are any), and end after another one.
        tokens = np.zeros((sizes.rows, shape.suffix), np.int32)
        lengths, limits = np.ones(sizes.rows, np.int32), np.ones(sizes.rows, np.int32)
        for index, (prompt, row) in enumerate(zip(own, batch.rows, strict=True)):
            suffix = prompt.tokens[row.shared :]
            tokens[index, : len(suffix)] = suffix
            lengths[index], limits[index] = len(suffix), prompt.max_new_tokens
        prefix_chunk, chunk = _chunk(sizes.prefixes, shape.prefix, room), _chunk(sizes.rows, shape.suffix, room)
        prefixes = None
        if shape.prefix:
            begun = [(prompt.tokens, row.shared, row.group) for prompt, row in zip(own, batch.rows, strict=True)]
            prefixes = Prefixes(*prefix_arrays(begun, (sizes.prefixes, shape.prefix), sizes.rows))
        run = Generation(
            *(self.config, self.params, tokens, lengths),
            max_new_tokens=limits.tolist(),
            sampling=self.sampling,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            seed=seed % 2**31,
            prefill_chunk=chunk,
            slots=shape.suffix,
            room=shape.answer,
            prefixes=prefixes,
            prefix_chunk=prefix_chunk,
            options=self.options,
            dtype=self.dtype,
        )
        shared = {row.group: row.shared for row in batch.rows if row.shared}
        self.work.tokens += int(lengths[: len(own)].sum()) + sum(shared.values())
        self.work.slots += sizes.prefixes * up_to_multiple(shape.prefix, prefix_chunk or 1)
        self.work.slots += sizes.rows * up_to_multiple(shape.suffix, chunk or 1)
        self.work.programs.add(Programs(shape, sizes, prefix_chunk, chunk))
        answers = [_Answer(self.tokenizer, prompt, self.eos_ids) for prompt in own]
        ended = np.ones(sizes.rows, bool)
        while not run.done:
            ended[: len(own)] = [one.ended for one in answers]
            if ended.all():
                break
            new = run.advance(_STEP, ended)
            for one, ids in zip(answers, new, strict=False):
                one.add(ids.tolist())
        self.work.new_tokens += sum(one.count for one in answers)
        self.work.unstopped += sum(not one.stopped for one in answers)
        return [one.text for one in answers]


def _chunk(rows: int, slots: int, room: Room) -> int | None:
    """Tokens of each piece in which rows are read, or None for a single one."""
    # Pieces of one length: a last one that is mostly padding costs as much as the others.
    pieces = max(1, -(-rows * slots // room.slots))
    chunk = -(-slots // (16 * pieces)) * 16
    return None if chunk >= slots else chunk


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
