"""Log-probabilities of many continuations, each after its own context, without logits leaving the device.

A batch reads every shared prefix once into a cache, gives each row a copy of its prefix, and reads the rows' suffixes
behind it. Logits exist for a few positions at a time and only for those that are asked for; of each, one
log-probability comes back, and whether the token was the most probable one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen2_jax.config import Qwen2Config
from qwen2_jax.evaluation.memory import Room, room_for
from qwen2_jax.evaluation.score_plan import Batch, ScorePlan, Sizes, plan_scores
from qwen2_jax.evaluation.sharing import prefix_arrays
from qwen2_jax.generation import Prefixes, check_ids, read_prefixes, real_tokens
from qwen2_jax.layers import Options
from qwen2_jax.model import Params, forward, logits_of

PROGRAMS = 4
"""Most shapes of batches of one call, and with it programs, unless told otherwise."""

_LOGITS = 64 * 1024 * 1024
"""Bytes of logits that exist at a time, about."""


class Score(NamedTuple):
    log_likelihood: float
    """Of the whole continuation, the natural logarithm, at most 0."""
    greedy: bool
    """Whether each of its tokens was the most probable one."""


@dataclasses.dataclass
class Work:
    """What scoring took."""

    tokens: int = 0
    """Computed, without padding; a shared prefix counts once in every batch."""
    slots: int = 0
    """Computed, padding included."""
    given: int = 0
    """Of all contexts and continuations together, as if nothing were shared; without those that were cut off."""
    truncated: int = 0
    """Requests that lost tokens at their beginning."""
    shapes: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
    """Of the programs that ran."""

    @property
    def padding(self) -> float:
        """The share of slots that were computed for nothing."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


def score_continuations(
    config: Qwen2Config,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    options: Options = Options(),
    dtype: jax.typing.DTypeLike | None = None,
    max_length: int | None = None,
    max_rows: int | None = None,
) -> list[Score]:
    """The log-likelihood of each continuation after its context.

    Contexts that begin alike are read once. Arguments and errors are those of `Scorer` and its `scores`.

    Args:
      pairs: contexts of at least one token and continuations, token ids.

    Returns:
      A score for each pair, in order.
    """
    scorer = Scorer(config, params, options=options, dtype=dtype, max_length=max_length, max_rows=max_rows)
    scores: list[Score] = [Score(0.0, True)] * len(pairs)
    for index, score in scorer.scores(pairs):
        scores[index] = score
    return scores


class Scorer:
    """Scores pairs of contexts and continuations, and counts what that took (`work`)."""

    def __init__(
        self,
        config: Qwen2Config,
        params: Params,
        *,
        options: Options = Options(),
        dtype: jax.typing.DTypeLike | None = None,
        max_length: int | None = None,
        max_rows: int | None = None,
        multiple: int = 1,
        programs: int = PROGRAMS,
        share: bool = True,
        room: Room | None = None,
    ):
        """
        Args:
          config: the model.
          params: its parameters, per layer or stacked.
          options: how to compute.
          dtype: of activations and cache; the embedding's by default.
          max_length: most tokens that the model reads at once; longer inputs lose tokens at their beginning. The
            model's by default.
          max_rows: most rows of a batch; as many as memory has room for by default.
          multiple: what numbers of rows are rounded up to, the devices that batches are split over.
          programs: most shapes of batches of one call of `scores`.
          share: whether to read shared beginnings once.
          room: how many tokens a batch may have; found out from the memory that is free at first by default.

        Raises:
          ValueError: for a maximum length that the model does not reach, or numbers below 1.
        """
        bounds = {"max_length": max_length, "max_rows": max_rows, "multiple": multiple, "programs": programs}
        for name, number in bounds.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if max_length is not None and config.max_length is not None and max_length > config.max_length:
            raise ValueError(
                f"max_length is {max_length}, the model has {config.max_length} positions; give at most so many, or "
                "see `qwen2_jax.long_context` for longer inputs"
            )
        self.config, self.params, self.options = config, params, options
        self.dtype = jnp.dtype(dtype or params["embed"]["embedding"].dtype)
        self.max_length = config.max_length if max_length is None else max_length
        self.max_rows, self.multiple, self.programs = max_rows, multiple, programs
        self.share = share and not config.reads_by_prompt_length
        self.work = Work()
        self._room = room

    def scores(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], programs: int | None = None
    ) -> Iterator[tuple[int, Score]]:
        """Yields the index of each pair with its score, as they are finished.

        Of a pair that is too long, tokens at the beginning are left out, as the evaluation harness does.

        Args:
          pairs: contexts of at least one token and continuations, token ids. An empty continuation is certain.
          programs: most shapes of batches, if others than the scorer's.

        Raises:
          ValueError: for an empty context, a continuation that is longer than the model can read, ids outside the
            vocabulary, or a model that computes NaN.
        """
        cut, indices = [], []
        for index, (context, continuation) in enumerate(pairs):
            if len(continuation) == 0:
                yield index, Score(0.0, True)
                continue
            cut.append(self._cut(index, context, continuation))
            indices.append(index)
            self.work.given += sum(map(len, cut[-1]))
        if not cut:
            return
        for index, score in self._run(self._plan(cut, programs or self.programs)):
            yield indices[index], score

    def _cut(self, index: int, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], ...]:
        if len(context) == 0:
            raise ValueError(f"pair {index} has no context; begin it with at least one token, such as the end of text")
        check_ids(self.config, np.asarray((*context, *continuation)))
        if self.max_length is None or len(context) + len(continuation) <= self.max_length + 1:
            return context, continuation
        if len(continuation) > self.max_length:
            raise ValueError(
                f"the continuation of pair {index} has {len(continuation)} tokens, the model reads {self.max_length}; "
                "cut it in windows, or see `qwen2_jax.long_context`"
            )
        self.work.truncated += 1
        return context[len(context) + len(continuation) - self.max_length - 1 :], continuation

    def _plan(self, pairs: Sequence[tuple[Sequence[int], ...]], programs: int) -> ScorePlan:
        if self._room is None:
            self._room = room_for(self.config, self.params, self.dtype, self.options, self.multiple)
        plan = plan_scores(
            [(context, continuation) for context, continuation in pairs],
            slots=self._room.slots,
            cached=self._room.cached,
            programs=programs,
            share=self.share,
            max_rows=self.max_rows,
            multiple=self.multiple,
        )
        self.work.tokens += plan.tokens
        self.work.slots += plan.slots
        self.work.shapes |= {(shape, sizes) for shape, sizes in plan.sizes.items()}
        return plan

    def _run(self, plan: ScorePlan) -> Iterator[tuple[int, Score]]:
        # A request is asked for within one row, so it is finished with its batch. While the device computes a batch,
        # the one before is read.
        before: tuple[Batch, Any] | None = None
        for batch in plan.batches:
            after = (batch, self._start(batch, plan.sizes[batch.shape]))
            if before is not None:
                yield from _read(*before)
            before = after
        if before is not None:
            yield from _read(*before)

    def _start(self, batch: Batch, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
        vocab = self.config.vocab_size
        return _log_probabilities(
            self.params,
            _arrays(batch, sizes),
            config=self.config,
            options=self.options,
            dtype=self.dtype,
            chunk=max(1, min(sizes.asks, _LOGITS // (4 * vocab) * self.multiple)),
        )


class _Arrays(NamedTuple):
    """A batch for the device: P prefixes of W slots, R suffixes of C slots, A numbers asked for."""

    prefixes: Prefixes
    """int32."""
    suffixes: np.ndarray
    """[R, C] int32."""
    suffix_lengths: np.ndarray
    """[R] int32."""
    places: np.ndarray
    """[A] int32: row times C plus slot."""
    targets: np.ndarray
    """[A] int32."""


def _arrays(batch: Batch, sizes: Sizes) -> _Arrays:
    shape = batch.shape
    rows = [(row.tokens, row.shared, row.group) for row in batch.rows]
    prefixes = Prefixes(*prefix_arrays(rows, (sizes.prefixes, shape.prefix), sizes.rows))
    suffixes, suffix_lengths = np.zeros((sizes.rows, shape.suffix), np.int32), np.zeros(sizes.rows, np.int32)
    places, targets = np.zeros(sizes.asks, np.int32), np.zeros(sizes.asks, np.int32)
    asked = 0
    for index, row in enumerate(batch.rows):
        suffix = row.tokens[row.shared :]
        suffixes[index, : len(suffix)] = suffix
        suffix_lengths[index] = len(suffix)
        for ask in row.asks:
            places[asked] = index * shape.suffix + ask.position - row.shared
            targets[asked] = ask.token
            asked += 1
    return _Arrays(prefixes, suffixes, suffix_lengths, places, targets)


def _read(batch: Batch, results: tuple[jax.Array, jax.Array]) -> Iterator[tuple[int, Score]]:
    log_probabilities, greedy = (np.asarray(result) for result in results)
    asks = [ask for row in batch.rows for ask in row.asks]
    scores: dict[int, Score] = {}
    for ask, value, best in zip(asks, log_probabilities[: len(asks)].tolist(), greedy[: len(asks)], strict=True):
        before = scores.get(ask.request, Score(0.0, True))
        scores[ask.request] = Score(before.log_likelihood + value, before.greedy and bool(best))
    if not np.isfinite([score.log_likelihood for score in scores.values()]).all():
        raise ValueError(
            "the model computes NaN or infinity: its weights are damaged, or too large for the dtype; check them with "
            "`qwen2-jax convert verify`, or try float32"
        )
    yield from scores.items()


@functools.partial(jax.jit, static_argnames=("config", "options", "dtype", "chunk"))
def _log_probabilities(
    params: Params, batch: _Arrays, *, config: Qwen2Config, options: Options, dtype: Any, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """[A] float32 log-probabilities of what is asked for, and [A] bool: whether it was the most probable."""
    run: Callable[..., Any] = functools.partial(forward, config, params, dtype=dtype, options=options, logits="none")
    real = real_tokens(jnp.asarray(batch.suffixes), jnp.asarray(batch.suffix_lengths)).astype(jnp.int32)
    if batch.prefixes.tokens.shape[1]:
        cache = read_prefixes(config, params, batch.prefixes, batch.suffixes.shape[1], dtype, options)
        hidden = run(batch.suffixes, segment_ids=real, cache=cache).hidden
    else:
        hidden = run(batch.suffixes, segment_ids=real, right_padded=True).hidden
    wanted = hidden.reshape(-1, hidden.shape[-1])[batch.places]
    count = -(-len(wanted) // chunk)
    padding = count * chunk - len(wanted)
    wanted = jnp.pad(wanted, ((0, padding), (0, 0))).reshape(count, 1, chunk, -1)
    targets = jnp.pad(jnp.asarray(batch.targets), (0, padding)).reshape(count, chunk)
    ids = jnp.arange(config.vocab_size, dtype=jnp.int32)[None]
    place = options.placement.activation

    def of_chunk(inputs):
        wanted, targets = inputs
        # Reductions over the vocabulary only, which may be split over devices; no gathering, no argmax.
        wanted = place(wanted, (None, "batch", "embed"))
        logits = place(logits_of(config, params, wanted, options), (None, "batch", "vocab"))[0]
        top = logits.max(axis=-1)
        lse = top + jnp.log(jnp.exp(logits - top[:, None]).sum(axis=-1))
        chosen = jnp.where(ids == targets[:, None], logits, 0.0).sum(axis=-1)
        first = jnp.where(logits == top[:, None], ids, config.vocab_size).min(axis=-1)
        return chosen - lse, first == targets

    results = lax.map(of_chunk, (wanted, targets))
    log_probabilities, greedy = (place(x.reshape(-1)[: len(batch.places)], (None,)) for x in results)
    return log_probabilities, greedy
