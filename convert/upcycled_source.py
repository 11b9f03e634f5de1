"""The numbers of an upcycled model, any run of them on its own, from the dense model and a seed.

Every random number is a function of the seed and its place in the model, so the same files come about whatever the
number of threads, the size of chunks, and however often the work was interrupted.
"""

import contextlib
import enum
import re
import threading
from collections.abc import Iterator

import numpy as np

from convert.chunks import Chunk, FolderSource, Source, chunk_shape, chunks_of
from convert.dtypes import cast
from convert.names import arrays_of
from convert.upcycle_recipe import Recipe, upcycled_config

_CUT = re.compile(r"layers_(\d+)\.moe\.(experts|shared_expert)\.(gate|up|down)(?:\.kernel)?")
_ROUTER = re.compile(r"layers_(\d+)\.moe\.router\.kernel")
_SHARED_GATE = re.compile(r"layers_(\d+)\.moe\.shared_expert_gate\.kernel")
_BLOCK = 1 << 16  # numbers whose statistics are taken together


class _Use(enum.IntEnum):
    """What random numbers are for; part of where in the generator's sequence they come from, so never renumbered."""

    ORDER_OF_EXPERTS = 0
    ORDER_OF_SHARED = 1
    UNITS = 2
    GATE = 3
    UP = 4
    DOWN = 5
    ROUTER = 6


class UpcycledSource:
    """The mixture of experts that `recipe` makes of a dense checkpoint, to be read like one that exists (see
    `convert.chunks.Source`).

    One matrix of the dense FFNs is in memory at a time. Whoever reads array by array in the order of `order` has each
    of them read once.

    Raises:
      ValueError: as `upcycled_config`.
    """

    def __init__(self, dense: FolderSource, recipe: Recipe):
        self.folder = dense.folder
        self.config = upcycled_config(dense.config, recipe)
        self.recipe = recipe
        self.arrays = arrays_of(self.config)
        self.dtypes = {path: dense.dtypes[_origin(path)] for path in self.arrays}
        self._dense = dense
        self._resident = _Resident(dense, recipe.reinit_std == "match")

    @property
    def resident_bytes(self) -> int:
        """Memory that is taken besides what `read` fills."""
        return self._resident.nbytes

    @property
    def order(self) -> list[str]:
        """The arrays, those cut from the same dense matrix side by side."""
        groups: dict[str, list[str]] = {}
        for path in self.arrays:
            groups.setdefault(_origin(path), []).append(path)
        return [path for group in groups.values() for path in group]

    def chunks(self, path: str) -> list[Chunk]:
        shape = self.arrays[path].shape
        return list(chunks_of(shape, chunk_shape(shape, self.dtypes[path].itemsize)))

    def read(self, path: str, start: int, out: np.ndarray) -> None:
        if _SHARED_GATE.fullmatch(path):
            out[:] = 0
            return
        if not (_CUT.fullmatch(path) or _ROUTER.fullmatch(path)):
            self._dense.read(path, start, out)
            return
        inner = self.arrays[path].shape[-1]
        first, last = start // inner, -(-(start + out.size) // inner)
        whole = out if out.size == (last - first) * inner else np.empty((last - first) * inner, out.dtype)
        self._fill(path, first, whole.reshape(-1, inner))
        if whole is not out:
            out[:] = whole[start - first * inner :][: out.size]

    def _fill(self, path: str, first: int, rows: np.ndarray) -> None:
        """Fills `rows` with the rows of an array, counted over all its leading axes, from `first` on."""
        if match := _ROUTER.fullmatch(path):
            for i, row in enumerate(rows):
                _normal(self._generator(_Use.ROUTER, int(match[1]), first + i), self.recipe.router_std, row)
            return
        match = _CUT.fullmatch(path)
        assert match is not None
        layer, shared, kind = int(match[1]), match[2] == "shared_expert", match[3]
        height = self.arrays[path].shape[-2]
        with self._resident.holding(_origin(path)) as (matrix, std):
            for expert in range(first // height, -(-(first + len(rows)) // height)):
                low, high = max(first, expert * height), min(first + len(rows), (expert + 1) * height)
                part, offset = rows[low - first : high - first], low - expert * height
                units = self._units(layer, shared, expert)
                _gather(matrix, kind, units, offset, part)
                if shared:
                    if kind == "down" and self.recipe.shared == "preserve":  # 2 against the gate's sigmoid(0)
                        _scale(part, np.float32(2) / np.bincount(units)[units].astype(np.float32))
                elif self.recipe.reinit == "entry":
                    self._draw_entries(layer, kind, self._new_std(std), low, part)
                elif self.recipe.reinit_fraction:
                    self._draw_units(layer, expert, kind, self._new_std(std), offset, low, part)

    def _units(self, layer: int, shared: bool, expert: int) -> np.ndarray:
        """[width] int64: of which unit of the dense FFN each unit of an expert is a copy."""
        width = self.recipe.shared_width if shared else self.recipe.expert_width
        use, dense = (_Use.ORDER_OF_SHARED if shared else _Use.ORDER_OF_EXPERTS), self.config.intermediate_size
        low, high = expert * width, (expert + 1) * width
        first = low // dense
        copies = [
            _order(self._generator(use, layer, copy).bit_generator, dense) for copy in range(first, -(-high // dense))
        ]
        return np.concatenate(copies)[low - first * dense : high - first * dense]

    def _new_std(self, kind_std: float) -> float:
        """Of the numbers drawn for experts, given the standard deviation of the dense matrix if that is to be it."""
        if self.recipe.reinit_std is None:
            return self.config.initializer_range
        return kind_std if self.recipe.reinit_std == "match" else self.recipe.reinit_std

    # Both draw for the rows of one expert from its `offset`-th on, the `low`-th of all experts.

    def _draw_units(
        self, layer: int, expert: int, kind: str, std: float, offset: int, low: int, rows: np.ndarray
    ) -> None:
        count = int(self.recipe.reinit_fraction * self.recipe.expert_width + 0.5)
        generator = self._generator(_Use.UNITS, layer, expert)
        units = _order(generator.bit_generator, self.recipe.expert_width)[:count]
        if kind == "down":
            for i, row in enumerate(rows):
                row[units] = _normal(self._generator(_Use.DOWN, layer, low + i), std, np.empty(count, row.dtype))
            return
        for i in (units - offset).tolist():
            if 0 <= i < len(rows):
                _normal(self._generator(_Use[kind.upper()], layer, low + i), std, rows[i])

    def _draw_entries(self, layer: int, kind: str, std: float, low: int, rows: np.ndarray) -> None:
        for i, row in enumerate(rows):
            generator = self._generator(_Use[kind.upper()], layer, low + i)
            raw = generator.bit_generator.random_raw(-(-row.size // 2)).view(np.uint32)[: row.size]
            places = np.flatnonzero(raw < self.recipe.reinit_fraction * 2**32)
            row[places] = _normal(generator, std, np.empty(places.size, row.dtype))

    def _generator(self, use: _Use, layer: int, row: int) -> np.random.Generator:
        """Random numbers that belong to one row of one array. The lowest word of the counter counts them."""
        key = np.array([self.recipe.seed, 0], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, row, layer, use], np.uint64)))


class _Resident:
    """One matrix of the dense FFNs in memory, for any number of threads; the next one takes its place."""

    def __init__(self, dense: Source, with_std: bool):
        paths = [path for path in dense.arrays if ".mlp." in path]
        self.nbytes = max(dense.arrays[path].size * dense.dtypes[path].itemsize for path in paths)
        self._dense, self._with_std = dense, with_std
        self._buffer: np.ndarray | None = None  # kept for all of them, so that no two are ever there
        self._path, self._std, self._readers = "", 0.0, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, path: str) -> Iterator[tuple[np.ndarray, float]]:
        """Keeps matrix `path` in memory meanwhile; gives it, and its standard deviation if that is wanted."""
        array, dtype = self._dense.arrays[path], self._dense.dtypes[path]
        with self._changed:
            self._changed.wait_for(lambda: self._path == path or not self._readers)
            if self._buffer is None:
                self._buffer = np.empty(self.nbytes, np.uint8)
            matrix = self._buffer[: array.size * dtype.itemsize].view(dtype)
            if self._path != path:
                self._path = ""  # should reading it fail
                for chunk in self._dense.chunks(path):
                    self._dense.read(path, chunk.start, matrix[chunk.start : chunk.stop])
                self._std = _standard_deviation(matrix) if self._with_std else 0.0
                self._path = path
            self._readers += 1
            std = self._std
        try:
            yield matrix.reshape(array.shape), std
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()


def _origin(path: str) -> str:
    """The array of the dense model that one of the new model is made of, or has the number format of."""
    if match := _CUT.fullmatch(path):
        return f"layers_{match[1]}.mlp.{match[3]}.kernel"
    if match := _ROUTER.fullmatch(path) or _SHARED_GATE.fullmatch(path):
        return f"layers_{match[1]}.mlp.gate.kernel"
    return path


def _order(bits: np.random.BitGenerator, count: int) -> np.ndarray:
    """A permutation of `count` things, int64. NumPy promises its raw bits for ever, but not `Generator.permutation`."""
    return np.argsort(bits.random_raw(count), kind="stable")


def _normal(generator: np.random.Generator, std: float, out: np.ndarray) -> np.ndarray:
    out[:] = cast(generator.standard_normal(out.size, np.float32) * np.float32(std), out.dtype)
    return out


def _gather(matrix: np.ndarray, kind: str, units: np.ndarray, offset: int, out: np.ndarray) -> None:
    """The rows from `offset` on of the matrix of an expert that consists of `units` of the dense one."""
    integer = f"u{matrix.itemsize}"  # several times faster than with bfloat16
    # Not "raise", the default: that would write into a second array first.
    if kind == "down":
        np.take(matrix[offset : offset + len(out)].view(integer), units, axis=1, out=out.view(integer), mode="clip")
    else:
        np.take(matrix.view(integer), units[offset : offset + len(out)], axis=0, out=out.view(integer), mode="clip")


def _scale(rows: np.ndarray, factors: np.ndarray) -> None:
    for row in rows:
        row[:] = cast(row.astype(np.float32) * factors, row.dtype)


def _standard_deviation(matrix: np.ndarray) -> float:
    """Of the finite numbers of a flat array."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, matrix.size, _BLOCK):
        block = matrix[start : start + _BLOCK].astype(np.float64)
        block = block[np.isfinite(block)]
        count, total, squares = count + block.size, total + float(block.sum()), squares + float(block @ block)
    mean = total / max(count, 1)
    return float(np.sqrt(max(squares / max(count, 1) - mean * mean, 0.0)))
