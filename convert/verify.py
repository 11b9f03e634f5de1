"""Are two checkpoints the same model? Compared number by number, whatever kind of folder each is."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from convert.chunks import Chunk, Source
from convert.dtypes import cast
from convert.files import as_bytes, cores
from convert.names import Array
from convert.stream import Progress
from qwen2_jax.config import Qwen2Config

_PROMPT_LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one parameter differs between two checkpoints."""

    array: str
    """Its path in our tree."""
    tensor: str
    """The Hugging Face tensor that holds the first differing number, and where in it."""
    index: tuple[int, ...]
    values: tuple[float, float]
    """The two numbers there."""
    count: int
    """How many numbers differ."""
    max_abs_diff: float
    """The largest difference; NaN if a NaN is on one side only."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    compared: int
    """Arrays that both have in the same shape."""
    numbers: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: tuple[str, ...]
    differences: tuple[Difference, ...]
    """In the order of the layers."""
    config: tuple[str, ...]
    """Fields of config.json that differ, as "field: a and b"."""

    @property
    def equal(self) -> bool:
        return not (self.only_in_a or self.only_in_b or self.other_shape or self.differences or self.config)


def compare(a: Source, b: Source, tolerance: float | None = None, progress: Progress | None = None) -> Comparison:
    """Compares two open checkpoints.

    Args:
      a: one.
      b: the other.
      tolerance: the largest |a - b| that counts as equal. None asks for equal bits; where dtypes differ, that the wider
        one rounds to exactly the narrower one.
      progress: called with the numbers done and the numbers in all.

    Raises:
      ValueError: if one of them is damaged.
      OSError: if one of them cannot be read.
    """
    shared = [path for path in a.arrays if path in b.arrays]
    same = [path for path in shared if a.arrays[path].shape == b.arrays[path].shape]
    total, done = sum(a.arrays[path].size for path in same), 0
    differences = []
    with ThreadPoolExecutor(min(4, cores())) as pool:
        # Two checkpoints at a time in each thread: a chunk of either, and whatever the comparison needs.
        for path, difference in zip(
            same, pool.map(lambda path: _compare_array(a, b, path, tolerance), same), strict=True
        ):
            if difference is not None:
                differences.append(difference)
            done += a.arrays[path].size
            if progress:
                progress(done, total)
    ours, theirs = dataclasses.asdict(a.config), dataclasses.asdict(b.config)
    return Comparison(
        compared=len(same),
        numbers=total,
        only_in_a=tuple(path for path in a.arrays if path not in b.arrays),
        only_in_b=tuple(path for path in b.arrays if path not in a.arrays),
        other_shape=tuple(f"{p}: {a.arrays[p].shape} and {b.arrays[p].shape}" for p in shared if p not in same),
        differences=tuple(differences),
        config=tuple(f"{k}: {ours[k]} and {theirs[k]}" for k in ours if k != "hf_json" and ours[k] != theirs[k]),
    )


def logits_difference(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs both models, in float32, on one fixed prompt.

    Returns:
      max_abs_diff: the largest difference between two logits.
      same_tokens: whether the most likely next token is the same at every position.
      prompt_tokens: the number of positions.
    """
    import jax  # comparing numbers alone needs no JAX
    import jax.numpy as jnp

    from convert.load import load_checkpoint
    from qwen2_jax.model import Qwen2

    @functools.cache
    def forward(config: Qwen2Config):
        def logits(params: Any, tokens: jax.Array) -> jax.Array:
            output: Any = Qwen2(config).apply({"params": params}, tokens)
            return output.logits

        return jax.jit(logits)

    scores = []
    for path in (a, b):
        config, params = load_checkpoint(path, dtype=np.float32)
        # Ids spread over the whole vocabulary, the same for both models if theirs are equally large.
        tokens = jnp.arange(1, _PROMPT_LENGTH + 1, dtype=jnp.int32)[None] * 7919 % config.vocab_size
        tokens = tokens[:, : config.max_position_embeddings]
        scores.append(np.asarray(forward(config)(params, tokens)))
    if scores[0].shape != scores[1].shape:
        raise ValueError(f"logits cannot be compared: their shapes are {scores[0].shape} and {scores[1].shape}")
    return {
        "max_abs_diff": float(np.max(np.abs(scores[0] - scores[1]))),
        "same_tokens": bool(np.array_equal(scores[0].argmax(-1), scores[1].argmax(-1))),
        "prompt_tokens": scores[0].shape[1],
    }


def _compare_array(a: Source, b: Source, path: str, tolerance: float | None) -> Difference | None:
    count, largest, first = 0, 0.0, None
    for chunk, x, y in _both(a, b, path):
        differ = _judge(x, y, tolerance)
        if differ is None:
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs(x[differ].astype(np.float64) - y[differ].astype(np.float64))
        count += int(distance.size)
        largest = float(np.maximum(largest, distance.max()))
        if first is None:
            at = int(np.argmax(differ))
            first = (chunk.start + at, float(x[at]), float(y[at]))
    if first is None:
        return None
    position, *values = first
    tensor, index = _in_tensor(a.arrays[path], position)
    return Difference(path, tensor, index, (values[0], values[1]), count, largest)


def _both(a: Source, b: Source, path: str) -> Iterator[tuple[Chunk, np.ndarray, np.ndarray]]:
    for chunk in a.chunks(path):
        sides = []
        for source in (a, b):
            numbers = np.empty(chunk.stop - chunk.start, source.dtypes[path])
            source.read(path, chunk.start, numbers)
            sides.append(numbers)
        yield chunk, sides[0], sides[1]


def _judge(x: np.ndarray, y: np.ndarray, tolerance: float | None) -> np.ndarray | None:
    """Which numbers differ; None if none does."""
    if x.dtype == y.dtype and as_bytes(x) == as_bytes(y):
        return None
    if tolerance is not None:
        x, y = x.astype(np.float32), y.astype(np.float32)
        with np.errstate(invalid="ignore"):
            differ = ~((np.abs(x - y) <= tolerance) | (x == y) | (np.isnan(x) & np.isnan(y)))
    else:
        if x.dtype != y.dtype:
            # Of two 16-bit formats neither is wider; then a must round to b.
            narrow = x.dtype if x.dtype.itemsize < y.dtype.itemsize else y.dtype
            x, y = cast(x, narrow), cast(y, narrow)
        bits = f"u{x.itemsize}"
        differ = x.view(bits) != y.view(bits)
    return differ if differ.any() else None


def _in_tensor(array: Array, position: int) -> tuple[str, tuple[int, ...]]:
    piece = next(array.overlaps(position, position + 1))
    return piece.name, tuple(int(i) for i in np.unravel_index(piece.offset, piece.shape))
