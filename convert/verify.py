"""Are two checkpoints the same model? Compared number by number, whatever kind of folder each is."""

import dataclasses
import functools
import math
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
from qwen2_jax.json_object import brief

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
    rounded_to: tuple[str, ...]
    """Number formats that wider numbers on the other side were rounded to before they were compared."""
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
      progress: called with the bytes read of both, and those there are in all.

    Raises:
      ValueError: if one of them is damaged, or the tolerance is not a number from 0 up.
      OSError: if one of them cannot be read.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"--tolerance must be a number from 0 up, got {tolerance}")
    shared = [path for path in a.arrays if path in b.arrays]
    same = [path for path in shared if a.arrays[path].shape == b.arrays[path].shape]
    sizes = {path: a.arrays[path].size * (a.dtypes[path].itemsize + b.dtypes[path].itemsize) for path in same}
    total, done = sum(sizes.values()), 0
    differences = []
    with ThreadPoolExecutor(min(4, cores())) as pool:
        # Two checkpoints at a time in each thread: a chunk of either, and whatever the comparison needs.
        for path, difference in zip(
            same, pool.map(lambda path: _compare_array(a, b, path, tolerance), same), strict=True
        ):
            if difference is not None:
                differences.append(difference)
            done += sizes[path]
            if progress:
                progress(done, total)
    ours, theirs = dataclasses.asdict(a.config), dataclasses.asdict(b.config)
    return Comparison(
        compared=len(same),
        numbers=sum(a.arrays[path].size for path in same),
        rounded_to=() if tolerance is not None else tuple(sorted(_rounded_to(a, b, same))),
        only_in_a=tuple(path for path in a.arrays if path not in b.arrays),
        only_in_b=tuple(path for path in b.arrays if path not in a.arrays),
        other_shape=tuple(f"{p}: {a.arrays[p].shape} and {b.arrays[p].shape}" for p in shared if p not in same),
        differences=tuple(differences),
        config=tuple(
            f"{k}: {brief(ours[k])} and {brief(theirs[k])}" for k in ours if k != "hf_json" and ours[k] != theirs[k]
        ),
    )


def logits_difference(a: Source, b: Source) -> dict[str, Any]:
    """Runs two open checkpoints, in float32 and one after the other, on one fixed prompt.

    Returns:
      max_abs_diff: the largest difference between two logits; NaN if a NaN is on one side only.
      same_tokens: whether the most likely next token is the same at every position.
      prompt_tokens: the number of positions.
    """
    import jax  # comparing numbers alone needs no JAX
    import jax.numpy as jnp

    from convert.load import load_open
    from qwen2_jax.model import Qwen2

    @functools.cache
    def forward(config: Qwen2Config):
        def logits(params: Any, tokens: jax.Array) -> jax.Array:
            output: Any = Qwen2(config).apply({"params": params}, tokens)
            return output.logits

        return jax.jit(logits)

    def scores_of(source: Source) -> np.ndarray:
        config, params = load_open(source, dtype=np.float32)
        # Ids spread over the whole vocabulary, the same for both models if theirs are equally large.
        tokens = jnp.arange(1, _PROMPT_LENGTH + 1, dtype=jnp.int32)[None] * 7919 % config.vocab_size
        tokens = tokens[:, : config.max_position_embeddings]
        return np.asarray(forward(config)(params, tokens))

    x, y = scores_of(a), scores_of(b)  # the parameters of one are gone before those of the other come
    if x.shape != y.shape:
        raise ValueError(f"logits cannot be compared: their shapes are {x.shape} and {y.shape}")
    with np.errstate(invalid="ignore"):
        distance = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
    return {
        "max_abs_diff": float(distance.max()),
        "same_tokens": bool(np.array_equal(x.argmax(-1), y.argmax(-1))),
        "prompt_tokens": x.shape[1],
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


def _rounded_to(a: Source, b: Source, paths: list[str]) -> set[str]:
    return {_narrower(a.dtypes[path], b.dtypes[path]).name for path in paths if a.dtypes[path] != b.dtypes[path]}


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
            narrow = _narrower(x.dtype, y.dtype)
            x, y = cast(x, narrow), cast(y, narrow)
        bits = f"u{x.itemsize}"
        differ = x.view(bits) != y.view(bits)
    return differ if differ.any() else None


def _narrower(a: np.dtype, b: np.dtype) -> np.dtype:
    """What numbers of two formats are rounded to: of two 16-bit ones neither is wider, and then a must round to b."""
    return a if a.itemsize < b.itemsize else b


def _in_tensor(array: Array, position: int) -> tuple[str, tuple[int, ...]]:
    piece = next(array.overlaps(position, position + 1))
    return piece.name, tuple(int(i) for i in np.unravel_index(piece.offset, piece.shape))
