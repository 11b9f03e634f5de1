"""The parameters of a training step, read as a checkpoint."""

import math
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from convert.chunks import Chunk, chunk_shape, chunks_of, fill
from convert.dtypes import BY_NAME
from convert.files import listing
from convert.folder import read_config
from convert.names import arrays_of, check_counts
from convert.step_folder import Manifest, check_array, check_files, open_array, read_box, read_manifest

_PREFIX = "params."


class StepSource:
    """A step folder of a training run, open for reading (see `convert.chunks.Source`): its parameters, nothing else.

    Before the first number of an array is handed out, all of it is compared with its digest. That reads everything
    twice, but never more than some chunks at a time.

    Raises:
      ValueError: if the manifest or another small file is damaged, or the arrays do not fit config.json.
      OSError: if a file cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._manifest: Manifest = read_manifest(folder)
        check_files(folder, self._manifest)
        self.config = read_config(folder)
        stored = {name: entry for name, entry in self._manifest.arrays.items() if name.startswith(_PREFIX)}
        check_counts(str(folder), self.config, len(stored) * self.config.num_hidden_layers, self.config.num_experts)
        self.arrays = arrays_of(self.config)
        self._places = {path: self._place(path) for path in self.arrays}
        expected = {leaf for leaf, _ in self._places.values()}
        layers = self.config.num_hidden_layers // self.config.layer_period
        wrong = {
            "arrays missing": sorted(expected - stored.keys()),
            "unknown arrays": sorted(stored.keys() - expected),
            "not as config.json has them": sorted(
                {
                    leaf
                    for path, (leaf, row) in self._places.items()
                    if leaf in stored
                    and (
                        stored[leaf].shape != (() if row is None else (layers,)) + self.arrays[path].shape
                        or stored[leaf].dtype not in BY_NAME
                    )
                }
            ),
        }
        if any(wrong.values()):
            raise ValueError(f"{folder}: the training step and config.json disagree: {listing(wrong)}")
        self.dtypes = {path: BY_NAME[stored[leaf].dtype] for path, (leaf, _) in self._places.items()}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._stores: dict[str, Any] = {}

    @property
    def weight_dtype(self) -> np.dtype | None:
        """The number format that config.json gives the model, which masters in training are wider than."""
        hf = self.config.to_hf()
        named = hf.get("dtype") or hf.get("torch_dtype")
        return BY_NAME.get(named) if isinstance(named, str) else None

    def chunks(self, path: str) -> list[Chunk]:
        shape = self.arrays[path].shape
        return list(chunks_of(shape, chunk_shape(shape, self.dtypes[path].itemsize)))

    def read(self, path: str, start: int, out: np.ndarray) -> None:
        leaf, row = self._places[path]
        store = self._checked(leaf)

        def read_chunk(chunk: Chunk, numbers: np.ndarray) -> None:
            box = chunk.box if row is None else (slice(row, row + 1), *chunk.box)
            numbers[:] = read_box(self.folder, self._manifest, leaf, store, box).reshape(-1)

        fill(out, start, self.chunks(path), read_chunk)

    def _checked(self, leaf: str) -> Any:
        with self._locks[leaf]:
            if leaf not in self._stores:
                check_array(self.folder, self._manifest, leaf)
                self._stores[leaf] = open_array(self.folder, self._manifest, leaf)
            return self._stores[leaf]

    def _place(self, path: str) -> tuple[str, int | None]:
        """The stored array that holds array `path` of the per-layer tree, and at which index of its first axis."""
        first, _, rest = path.partition(".")
        if not first.startswith("layers_"):
            return _PREFIX + path, None
        row, block = divmod(int(first.removeprefix("layers_")), self.config.layer_period)
        return f"{_PREFIX}layers.block_{block}.{rest}", row


def reading_bytes(source: StepSource) -> int:
    """Memory that reading takes besides what is read into: of each of some workers, the chunks that a run touches."""
    return min(256 << 20, 2 * max(math.prod(array.shape) * 4 for array in source.arrays.values()))
