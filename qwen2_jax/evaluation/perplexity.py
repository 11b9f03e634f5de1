"""Loss by position: whether a model still gains from context, or breaks, beyond the length it was trained on. And the
loss of a whole text, by windows that slide over it."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen2_jax.cache import empty_cache
from qwen2_jax.config import Qwen2Config
from qwen2_jax.generation import check_ids
from qwen2_jax.layers import Options
from qwen2_jax.model import Params, forward

PIECE = 256
"""Positions computed at once, unless told otherwise: their logits take 160 MB with Qwen2's vocabulary."""


def loss_by_position(
    config: Qwen2Config,
    params: Params,
    tokens: Any,
    *,
    piece: int = PIECE,
    options: Options = Options(),
    dtype: jax.typing.DTypeLike | None = None,
) -> np.ndarray:
    """The next-token cross entropy at every position, in nats.

    Tokens are fed in pieces with a cache, as a long prompt is, so that memory holds neither [T, V] logits nor the
    activations of T tokens. The softmax is float32.

    Args:
      config: the model.
      params: its parameters, per layer or stacked.
      tokens: [B, T] integer ids.
      piece: positions computed at once; changes nothing but time and memory.
      options: how to compute.
      dtype: of activations and cache; the embedding's by default.

    Returns:
      [B, T - 1] float32; entry t is the loss of predicting token t + 1 from tokens 0 to t.

    Raises:
      ValueError: for tokens of another shape or kind, fewer than two of them or more than the model has positions, ids
        outside the vocabulary, or an empty piece.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or min(tokens.shape) < 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers of shape [batch, length], got {tokens.dtype} of shape {tokens.shape}"
        )
    length = tokens.shape[1]
    if length < 2:
        raise ValueError("a single token has no next one to predict; give at least 2")
    if config.max_length is not None and length > config.max_length:
        raise ValueError(
            f"{length} tokens are more than the model's {config.max_length} positions; shorten them, or see "
            "`qwen2_jax.evaluation.modes.reaching`"
        )
    check_ids(config, tokens)
    if piece < 1:
        raise ValueError(f"a piece must have at least 1 position, got {piece}")
    piece = min(piece, length)
    padded = np.pad(tokens.astype(np.int32), ((0, 0), (0, -length % piece)))
    dtype = jnp.dtype(dtype or params["embed"]["embedding"].dtype)
    losses = _losses(
        params, padded, jnp.asarray(length, jnp.int32), config=config, piece=piece, options=options, dtype=dtype
    )
    return np.asarray(losses)[:, : length - 1]


def cut_windows(ids: Sequence[int], length: int, count: int) -> np.ndarray:
    """[count, length] int32: windows that do not overlap, spread evenly over the text.

    Raises:
      ValueError: if the text is too short for them, or the numbers are less than 1.
    """
    if length < 2 or count < 1:
        raise ValueError(f"expected at least 1 window of at least 2 tokens, got {count} of {length}")
    if len(ids) < length * count:
        raise ValueError(
            f"the text has {len(ids)} tokens, {count} windows of {length} need {length * count}; give more text, or "
            "ask for fewer or shorter windows"
        )
    starts = [len(ids) * index // count for index in range(count)]
    return np.asarray([ids[start : start + length] for start in starts], np.int32)


def slide_windows(ids: Sequence[int], length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows over a whole text, each `stride` tokens behind the one before; the last one ends with the text.

    Returns:
      windows [W, length] int32, of the whole text if that is shorter; and [W] how many tokens at the end of each are to
      be counted, those that no window before it holds. All but the text's first token are counted once.

    Raises:
      ValueError: for a text of less than 2 tokens, or a stride that leaves tokens out or none to predict from.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; a window needs at least 2")
    if not 1 <= stride < length:
        raise ValueError(f"the stride must be from 1 to {length - 1}, less than the window's length, got {stride}")
    length = min(length, len(ids))
    ends = [*range(length, len(ids), stride), len(ids)]
    counted = np.diff(np.asarray([1, *ends]))
    return np.asarray([ids[end - length : end] for end in ends], np.int32), counted


def bucket_means(losses: np.ndarray, size: int) -> np.ndarray:
    """[B, buckets] float64: means of losses [B, T - 1] over runs of `size` positions; the last run may be shorter."""
    starts = np.arange(0, losses.shape[1], size)
    sums = np.add.reduceat(losses.astype(np.float64), starts, axis=1)
    return sums / np.diff(np.append(starts, losses.shape[1]))


def loss_table(means: Mapping[str, np.ndarray], size: int, positions: int) -> list[dict[str, Any]]:
    """Loss and perplexity of each mode and bucket.

    Args:
      means: by mode, what `bucket_means` gave for all windows, [windows, buckets].
      size: of a bucket.
      positions: T - 1.

    Returns:
      For each mode and bucket "mode", "first" and "last" (how many tokens the model has read at the bucket's first and
      last position), "loss", its standard error over windows ("loss_error", None of one window), "perplexity".
    """
    rows = []
    for mode, of_windows in means.items():
        count = len(of_windows)
        for bucket, losses in enumerate(np.asarray(of_windows, np.float64).T):
            loss = float(losses.mean())
            rows.append(
                {
                    "mode": mode,
                    "first": bucket * size + 1,
                    "last": min((bucket + 1) * size, positions),
                    "loss": loss,
                    "loss_error": float(losses.std(ddof=1)) / math.sqrt(count) if count > 1 else None,
                    "perplexity": math.exp(min(loss, 700.0)),  # beyond, floats end
                }
            )
    return rows


def place_table(losses: Mapping[str, np.ndarray], counted: np.ndarray, most: int = 16) -> list[dict[str, Any]]:
    """Loss and perplexity of each mode and part of the text.

    Args:
      losses: by mode, the mean loss of each window that slides over the text.
      counted: tokens of each window that are counted.
      most: parts at most, each of about as many windows.

    Returns:
      Rows as those of `loss_table`; "first" and "last" are places in the text.
    """
    weights, ends = np.asarray(counted, np.float64), np.cumsum(counted)
    parts = [part for part in np.array_split(np.arange(len(counted)), most) if len(part)]
    rows = []
    for mode, of_windows in losses.items():
        for part in parts:
            loss = float(np.average(of_windows[part], weights=weights[part]))
            first, last = int(ends[part[0]] - counted[part[0]]) + 1, int(ends[part[-1]])
            rows.append({"mode": mode, "first": first, "last": last, "loss": loss, "loss_error": None})
            rows[-1]["perplexity"] = math.exp(min(loss, 700.0))
    return rows


def total_loss(nats: float, tokens: int, bytes: int) -> dict[str, Any]:
    """What a text's loss comes to per token, and per byte, which does not depend on the tokenizer.

    Args:
      nats: the losses of all tokens that are counted, summed up.
      tokens: how many.
      bytes: of text that they stand for, in UTF-8.
    """
    return {
        "tokens": tokens,
        "bytes": bytes,
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_token": nats / tokens / math.log(2),
        "bits_per_byte": nats / bytes / math.log(2),
    }


@functools.partial(jax.jit, static_argnames=("config", "piece", "options", "dtype"))
def _losses(
    params: Params,
    tokens: jax.Array,
    length: jax.Array,
    *,
    config: Qwen2Config,
    piece: int,
    options: Options,
    dtype: Any,
) -> jax.Array:
    """[B, W] float32 losses of tokens [B, W], W a multiple of `piece`, of which the first `length` are real."""
    rows, width = tokens.shape
    real = jnp.broadcast_to((jnp.arange(width, dtype=jnp.int32) < length)[None], tokens.shape)
    targets = jnp.roll(tokens, -1, axis=1)

    def step(cache, inputs):
        tokens, real, targets = inputs
        lengths = jnp.broadcast_to(length, tokens.shape)
        segments = real.astype(jnp.int32)
        out = forward(
            *(config, params, tokens, dtype, options),
            segment_ids=segments,
            cache=cache,
            logits="all",
            lengths=lengths,
        )
        assert out.cache is not None and out.logits is not None
        chosen = jnp.take_along_axis(out.logits, targets[..., None], axis=-1)[..., 0]
        return out.cache, jax.nn.logsumexp(out.logits, axis=-1) - chosen

    pieces = tuple(x.reshape(rows, -1, piece).swapaxes(0, 1) for x in (tokens, real, targets))
    cache = empty_cache(config, rows, width, dtype, "layers" in params, options.heads)
    _, losses = lax.scan(step, cache, pieces)
    losses = options.placement.activation(losses, (None, None, None))
    return losses.swapaxes(0, 1).reshape(rows, width)
