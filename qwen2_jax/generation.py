"""Text generation: one compiled prefill per length bucket, one compiled decode loop.

The prompt's length is rounded up to a bucket, so few programs are compiled; the decode loop runs on the device until
every row has ended, with no round trip per token.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from qwen2_jax.cache import Cache, copy_rows, empty_cache, extend_cache
from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Options
from qwen2_jax.model import Output, Params, forward
from qwen2_jax.placement import Placement
from qwen2_jax.sampling import Sampling, Steps, Values, next_token

STREAM_CHUNK = 8
"""Tokens per call of the device while streaming."""


@struct.dataclass
class State:
    """Everything that the decode loop carries; its buffers are donated from call to call."""

    cache: Cache
    token: jax.Array
    """[B] int32, the newest token of each row, not yet in the cache."""
    answer: jax.Array
    """[B, M] int32, the tokens chosen so far; padding from `count` on and after a row's end."""
    count: jax.Array
    """Tokens chosen so far, a scalar int32."""
    limits: jax.Array
    """[B] int32, most tokens to choose for each row."""
    ended: jax.Array
    """[B] bool."""
    finite: jax.Array
    """Whether all logits so far were numbers, a scalar bool."""
    seen: jax.Array | None
    """[B, V] bool, ids in the prompt and the answer, if a repetition penalty asks for them."""
    key: jax.Array


class Prefixes(NamedTuple):
    """Beginnings that several prompts of a batch have in common, read once each."""

    tokens: Any
    """[P, W] integer ids, rows padded on the right."""
    lengths: Any
    """[P] real tokens of each row, which may be none."""
    of: Any
    """[B] which one each prompt begins with."""


def generate(
    config: Qwen2Config,
    params: Params,
    tokens: Any,
    lengths: Any = None,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    seed: int = 0,
    prefill_chunk: int | None = None,
    options: Options = Options(),
    dtype: jax.typing.DTypeLike | None = None,
) -> np.ndarray:
    """Continues each row of a batch of prompts.

    Args:
      config: the model.
      params: its parameters, per layer (faster here) or stacked.
      tokens: [B, T] integer ids, rows padded on the right.
      lengths: [B] real tokens of each row; all T by default.
      max_new_tokens: most tokens to add to a row; one number for all or one for each.
      temperature: 0 for greedy; see `qwen2_jax.sampling.Sampling` for this and the next three.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
      repetition_penalty: 1 changes nothing.
      eos_ids: a row ends with the first of these that is chosen; it is part of the answer.
      pad_id: fills a row after its end.
      seed: of the random choices; the same seed and batch give the same tokens.
      prefill_chunk: prompts are fed in pieces of so many tokens, which bounds the memory of activations; in one piece
        by default.
      options: how to compute; its attention is that of the prompts, single queries always take the fastest.
      dtype: of activations and cache; the embedding's by default.

    Returns:
      [B, new] int32; as many columns as the longest answer has.

    Raises:
      ValueError: for an empty prompt, ids outside the vocabulary, lengths that do not fit, more positions than the
        model has, or sampling values outside their ranges.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    return Generation(
        config,
        params,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        seed=seed,
        prefill_chunk=prefill_chunk,
        options=options,
        dtype=dtype,
    ).advance()


class Generation:
    """A batch of prompts being continued, for callers that want the tokens as they come or the phases apart.

    Building one runs the prefill and chooses each row's first token; `advance` runs the decode loop. Arguments and
    errors are those of `generate`, with the sampling keywords in one object. `slots` is what prompts are padded to and
    `room` what answers have room for, in tokens, by default the next of a few sizes; many batches of the same sizes
    share their programs. With `prefixes`, fed in pieces of `prefix_chunk` tokens, tokens and lengths are those of what
    follows each prompt's prefix.
    """

    def __init__(
        self,
        config: Qwen2Config,
        params: Params,
        tokens: Any,
        lengths: Any = None,
        *,
        max_new_tokens: int | Sequence[int] = 128,
        sampling: Sampling = Sampling(),
        eos_ids: Sequence[int] = (),
        pad_id: int = 0,
        seed: int = 0,
        prefill_chunk: int | None = None,
        slots: int | None = None,
        room: int | None = None,
        prefixes: Prefixes | None = None,
        prefix_chunk: int | None = None,
        options: Options = Options(),
        dtype: jax.typing.DTypeLike | None = None,
    ):
        if prefixes is not None:
            prefixes, prefix_chunk = _checked_prefixes(config, prefixes, prefix_chunk, len(tokens))
        before = 0 if prefixes is None else prefixes.lengths[prefixes.of]
        tokens, lengths, limits = checked_prompts(config, tokens, lengths, max_new_tokens, before)
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        longest, most = int(lengths.max()), int(limits.max())
        width, room = slots or bucket(longest), room or bucket(most)
        assert longest <= width and most <= room
        if prefill_chunk is not None and prefill_chunk >= width:
            prefill_chunk = None
        if prefill_chunk is not None:
            width += -width % prefill_chunk
        padded = np.zeros((len(tokens), width), np.int32)
        padded[:, :longest] = tokens[:, :longest]
        dtype = jnp.dtype(dtype or params["embed"]["embedding"].dtype)

        self.max_new_tokens = most
        self.rows = len(tokens)
        self._taken = 0
        ends = _Ends(jnp.asarray(tuple(eos_ids), jnp.int32), jnp.asarray(pad_id, jnp.int32))
        self._step = functools.partial(
            _decode,
            params,
            values=sampling.values,
            ends=ends,
            config=config,
            steps=sampling.steps,
            options=options._replace(attention=None),
            dtype=dtype,
        )
        self._state = _prefill(
            *(params, padded, lengths, limits, jax.random.key(seed), sampling.values, ends),
            prefixes=prefixes,
            config=config,
            steps=sampling.steps,
            room=room,
            chunk=prefill_chunk,
            prefix_chunk=prefix_chunk,
            options=options,
            dtype=dtype,
        )

    @property
    def done(self) -> bool:
        """Whether every row has ended, or has all its new tokens, and `advance` has returned them."""
        count = int(self._state.count)
        return self._taken == count and (count >= self.max_new_tokens or bool(self._state.ended.all()))

    def advance(self, tokens: int | None = None, ended: Any = None) -> np.ndarray:
        """Chooses up to `tokens` more tokens (all that are left by default) and returns them, [B, new] int32.

        `ended`, [B] bool, are rows that the caller has seen enough of.

        Raises:
          ValueError: if the model computes NaN or infinity, so that no token is more probable than another.
        """
        limit = self.max_new_tokens if tokens is None else min(self._taken + tokens, self.max_new_tokens)
        ended = np.zeros(self.rows, bool) if ended is None else np.asarray(ended, bool)
        self._state = self._step(self._state, jnp.asarray(limit, jnp.int32), ended)
        if not self._state.finite:
            raise ValueError(
                "the model computes NaN or infinity for this prompt: its weights are damaged, or too large for the "
                "dtype; check them with `qwen2-jax convert verify`, or try float32"
            )
        taken, self._taken = self._taken, int(self._state.count)
        return np.asarray(self._state.answer)[:, taken : self._taken]


def stream(run: Generation) -> Iterator[int]:
    """Yields the ids of a `Generation` of one prompt soon after they are chosen, the ending one included.

    Raises:
      ValueError: if there are several prompts.
    """
    if run.rows != 1:
        raise ValueError(f"only one prompt can be streamed, got {run.rows}")
    yield from (int(token) for token in run.advance(1)[0])
    while not run.done:
        yield from (int(token) for token in run.advance(STREAM_CHUNK)[0])


def trace_prefill(
    config: Qwen2Config,
    params: Params,
    rows: int,
    slots: int,
    room: int,
    options: Options = Options(),
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Any:
    """The prefill that `Generation` runs, not run: params are `jax.ShapeDtypeStruct`s, prompts have `slots` tokens."""
    each = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return _prefill.trace(
        *(params, jax.ShapeDtypeStruct((rows, slots), jnp.int32), each, each, *jax.eval_shape(_choosing)),
        config=config,
        steps=Sampling().steps,
        room=room,
        chunk=None,
        options=options,
        dtype=jnp.dtype(dtype),
    )


def trace_decode(config: Qwen2Config, params: Params, cache: Cache, room: int, options: Options = Options()) -> Any:
    """The decode loop that `Generation` runs, not run: params and the cache are `jax.ShapeDtypeStruct`s."""
    rows, dtype = cache.segment_ids.shape[0], jax.tree.leaves(cache.layers)[0].dtype
    key, values, ends = jax.eval_shape(_choosing)

    def empty() -> State:
        """All but the cache and the key."""
        each, count, ended = jnp.zeros(rows, jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(rows, bool)
        answer, finite = jnp.zeros((rows, room), jnp.int32), jnp.ones((), bool)
        return State(None, each, answer, count, limits=each, ended=ended, finite=finite, seen=None, key=None)  # type: ignore[arg-type]

    state = jax.eval_shape(empty).replace(cache=cache, key=key)
    count, ended = state.count, state.ended
    steps, options = Sampling().steps, options._replace(attention=None)
    return _decode.trace(
        *(params, state, count, ended, values, ends), config=config, steps=steps, options=options, dtype=dtype
    )


def _choosing() -> tuple[jax.Array, Values, "_Ends"]:
    """What greedy choices take, for one token that ends an answer."""
    return jax.random.key(0), Sampling().values, _Ends(jnp.zeros(1, jnp.int32), jnp.zeros((), jnp.int32))


def checked_prompts(
    config: Qwen2Config, tokens: Any, lengths: Any, max_new_tokens: int | Sequence[int], before: Any = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens [B, T], lengths [B] and most new tokens [B] as int32 arrays, if the model can continue them so; padding is
    set to 0. `before` is how many tokens of each prompt are not among them.

    Raises:
      ValueError: as `generate` says.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers of shape [batch, length], got {tokens.dtype} of shape {tokens.shape}"
        )
    rows, width = tokens.shape
    lengths = np.full(rows, width) if lengths is None else np.asarray(lengths)
    if lengths.shape != (rows,) or rows == 0 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"lengths must hold a whole number for each of {rows} prompts, got {lengths.dtype} of shape {lengths.shape}"
        )
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(
            f"every prompt must have 1 to {width} tokens, got lengths from {lengths.min()} to {lengths.max()}"
        )
    tokens = np.where(np.arange(width)[None] < lengths[:, None], tokens, 0)
    check_ids(config, tokens)
    limits = np.asarray(max_new_tokens)
    if limits.shape not in ((), (rows,)) or not np.issubdtype(limits.dtype, np.integer) or limits.min() < 1:
        raise ValueError(
            f"max_new_tokens must be at least 1, one number for all or for each of {rows} prompts, got {max_new_tokens}"
        )
    limits, whole = np.broadcast_to(limits, (rows,)), before + lengths
    row = int(np.argmax(whole + limits))
    needed = int(whole[row] + limits[row])
    if config.max_length is not None and needed > config.max_length:
        raise ValueError(
            f"a prompt of {whole[row]} tokens and {limits[row]} new ones need {needed} positions, the model has "
            f"{config.max_length}; shorten them, or extend it by --mode (docs/long-context.md)"
        )
    return tokens.astype(np.int32), lengths.astype(np.int32), limits.astype(np.int32)


def _checked_prefixes(
    config: Qwen2Config, prefixes: Prefixes, chunk: int | None, rows: int
) -> tuple[Prefixes, int | None]:
    """As int32 arrays, padding set to 0 and their width a multiple of the pieces', and the pieces' size.

    Raises:
      ValueError: for shapes and numbers that do not fit.
    """
    tokens, lengths, of = arrays = [np.asarray(x) for x in prefixes]
    fits = tokens.ndim == 2 and lengths.shape == tokens.shape[:1] and of.shape == (rows,)
    if not fits or not all(np.issubdtype(x.dtype, np.integer) for x in arrays):
        got = ", ".join(f"{x.dtype} of shape {x.shape}" for x in arrays)
        raise ValueError(f"prefixes must be integers of shapes [P, W], [P] and [{rows}], got {got}")
    count, width = tokens.shape
    if ((lengths < 0) | (lengths > width)).any() or ((of < 0) | (of >= count)).any():
        raise ValueError(f"prefixes have 0 to {width} tokens and numbers from 0 to {count - 1}, got {lengths} and {of}")
    if config.reads_by_prompt_length:
        raise ValueError(
            "a temperature that follows the whole prompt's length makes the same beginning another one in each prompt; "
            "read such prompts without prefixes"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefix_chunk must be at least 1, got {chunk}")
    tokens = np.where(np.arange(width)[None] < lengths[:, None], tokens, 0)
    check_ids(config, tokens)
    chunk = None if chunk is None or chunk >= width else chunk
    tokens = np.pad(tokens, ((0, 0), (0, -width % (chunk or 1))))
    return Prefixes(tokens.astype(np.int32), lengths.astype(np.int32), of.astype(np.int32)), chunk


def check_ids(config: Qwen2Config, tokens: np.ndarray) -> None:
    """Raises ValueError for ids outside the vocabulary; `tokens` holds at least one."""
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)][0]
        raise ValueError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")


def bucket(length: int) -> int:
    """length rounded up to a multiple of 16, from 128 on such that each doubling of length has four buckets."""
    step = max(16, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


class _Ends(NamedTuple):
    eos_ids: jax.Array
    pad_id: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "steps", "room", "chunk", "prefix_chunk", "options", "dtype"))
def _prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    key: jax.Array,
    values: Values,
    ends: _Ends,
    prefixes: Prefixes | None = None,
    *,
    config: Qwen2Config,
    steps: Steps,
    room: int,
    chunk: int | None,
    prefix_chunk: int | None = None,
    options: Options,
    dtype: Any,
) -> State:
    """Runs the prompts [B, T], or what follows their prefixes, into a cache with `room` for answers and chooses each
    row's first token."""
    rows, width = tokens.shape
    if prefixes is None:
        # As wide as the prompts: a prefill attends to every slot, and the room behind them is empty.
        cache, whole = empty_cache(config, rows, width, dtype, "layers" in params, options.heads), lengths
    else:
        prefixes = Prefixes(*map(jnp.asarray, prefixes))
        cache = read_prefixes(config, params, prefixes, width, dtype, options, prefix_chunk)
        whole = lengths + prefixes.lengths[prefixes.of]
    begin = cache.size - width
    run = functools.partial(forward, config, params, dtype=dtype, options=options)
    cache, scores = _read(run, cache, tokens, lengths, whole, chunk, jnp.zeros((rows, config.vocab_size)))
    assert scores is not None
    seen = None
    if steps.penalised:
        seen = _ids_in(tokens, lengths, config.vocab_size)
        if prefixes is not None:
            seen |= _ids_in(prefixes.tokens, prefixes.lengths, config.vocab_size)[prefixes.of]
    state = State(
        # The padding after the longest prompt is invisible: let the answer overwrite it.
        cache=dataclasses.replace(extend_cache(cache, cache.size + room), length=begin + lengths.max()),
        token=jnp.zeros(rows, jnp.int32),
        answer=jnp.broadcast_to(ends.pad_id, (rows, room)),
        count=jnp.zeros((), jnp.int32),
        limits=limits,
        ended=jnp.zeros(rows, bool),
        finite=jnp.ones((), bool),
        seen=seen,
        key=key,
    )
    return _choose(state, scores, steps, values, ends, options.placement)


def read_prefixes(
    config: Qwen2Config,
    params: Params,
    prefixes: Prefixes,
    width: int,
    dtype: jax.typing.DTypeLike,
    options: Options,
    chunk: int | None = None,
) -> Cache:
    """A cache of rows that begin with their prefixes, each read once, and have room for `width` more tokens."""
    tokens, lengths, of = map(jnp.asarray, prefixes)
    count, before = tokens.shape
    run = functools.partial(forward, config, params, dtype=dtype, options=options)
    cache = empty_cache(config, count, before, dtype, "layers" in params, options.heads)
    cache, _ = _read(run, cache, tokens, lengths, lengths, chunk, None)
    return extend_cache(copy_rows(cache, of), cache.size + width)


def _read(
    run: Callable[..., Output],
    cache: Cache,
    tokens: jax.Array,
    lengths: jax.Array,
    whole: jax.Array,
    chunk: int | None,
    scores: jax.Array | None,
) -> tuple[Cache, jax.Array | None]:
    """Reads tokens [B, T] of `lengths` [B] into the cache, in pieces of `chunk`.

    `whole` [B] are the lengths with what the cache holds. Of `scores` [B, V], if they are not None, become the logits
    behind each row's last token.
    """
    rows, width = tokens.shape
    # Nothing before them, and their padding behind them.
    right_padded = chunk is None and cache.size == width

    def piece(carry, inputs):
        cache, scores = carry
        tokens, real = inputs
        out = run(
            tokens,
            segment_ids=real.astype(jnp.int32),
            cache=cache,
            logits="none" if scores is None else "last",
            lengths=jnp.broadcast_to(whole[:, None], tokens.shape),
            right_padded=right_padded,
        )
        if scores is not None:
            assert out.logits is not None
            scores = jnp.where(real.any(axis=1, keepdims=True), out.logits[:, 0], scores)
        return (out.cache, scores), None

    real = real_tokens(tokens, lengths)
    if chunk is None:
        return piece((cache, scores), (tokens, real))[0]
    pieces = [x.reshape(rows, -1, chunk).swapaxes(0, 1) for x in (tokens, real)]
    return lax.scan(piece, (cache, scores), tuple(pieces))[0]


def real_tokens(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, T] bool: which of tokens [B, T] are none of the padding behind `lengths` [B]."""
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]


def _ids_in(tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array:
    """[B, V] bool: which ids each row holds."""
    rows = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    real = real_tokens(tokens, lengths).astype(jnp.int32)
    return jnp.zeros((len(tokens), vocab_size), jnp.int32).at[rows, tokens].max(real) > 0


@functools.partial(jax.jit, static_argnames=("config", "steps", "options", "dtype"), donate_argnames=("state",))
def _decode(
    params: Params,
    state: State,
    limit: jax.Array,
    ended: jax.Array,
    values: Values,
    ends: _Ends,
    *,
    config: Qwen2Config,
    steps: Steps,
    options: Options,
    dtype: Any,
) -> State:
    """Adds tokens until `limit` of them are chosen or every row has ended, those of `ended` [B] at once."""
    state = dataclasses.replace(state, ended=state.ended | ended)

    def unfinished(state: State) -> jax.Array:
        return (state.count < limit) & ~state.ended.all()

    def step(state: State) -> State:
        out = forward(config, params, state.token[:, None], dtype, options, cache=state.cache)
        assert out.cache is not None and out.logits is not None
        state = dataclasses.replace(state, cache=out.cache)
        return _choose(state, out.logits[:, 0], steps, values, ends, options.placement)

    return lax.while_loop(unfinished, step, state)


def _choose(state: State, logits: jax.Array, steps: Steps, values: Values, ends: _Ends, placement: Placement) -> State:
    """Appends one token per row, chosen by logits [B, V]."""
    key, now = jax.random.split(state.key)
    # Choosing sorts and compares over the whole vocabulary, and every process reads what was chosen for all rows.
    logits = placement.activation(logits, (None, None))
    token = jnp.where(state.ended, ends.pad_id, next_token(logits, now, state.seen, steps, values))
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token), dtype=jnp.int32), token].set(True)
    token = placement.activation(token, (None,))
    return dataclasses.replace(
        state,
        token=token,
        answer=lax.dynamic_update_slice(state.answer, token[:, None], (0, state.count)),
        count=state.count + 1,
        finite=state.finite & jnp.isfinite(logits).all(),
        ended=state.ended | (token[:, None] == ends.eos_ids[None, :]).any(axis=1) | (state.count + 1 >= state.limits),
        seen=seen,
        key=key,
    )
