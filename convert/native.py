"""Our checkpoint folder: what Hugging Face puts beside its weights, the arrays in zarr, and a digest of everything.

    config.json, tokenizer.json, ...     as in the Hugging Face folder
    params/<path>/zarr.json, c/i/j/k     one directory per array: zarr 3, uncompressed, a file of numbers per chunk
    params/_METADATA, ...                what Orbax needs to restore params/ as a PyTree checkpoint
    manifest.json                        the arrays, and the sha256 of every chunk file and every other file

A chunk file is nothing but its numbers, so `sha256sum` of the file is the digest in the manifest. The manifest is
written last: a folder without one is not a checkpoint.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.chunks import Chunk, chunk_shape, chunks_of, fill, is_chunk_shape
from convert.dtypes import BY_NAME
from convert.files import as_bytes, listing, read_at, read_json, sha256, sha256_file, write_at
from convert.folder import read_config
from convert.names import Array, Shape, arrays_of, check_counts
from qwen2_jax.json_object import brief

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "qwen2_jax checkpoint", 1
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,200}", re.ASCII)
_ORBAX_FILES = ("params/_METADATA", "params/_CHECKPOINT_METADATA")


class NativeSource:
    """A checkpoint folder of ours, open for reading (see `convert.chunks.Source`); every chunk read is checked first.

    Raises:
      ValueError: if the manifest is malformed, belongs to another version or does not fit config.json, or if one of the
        small files is not what its digest says.
      OSError: if a file cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files, entries = _read_manifest(folder / MANIFEST)
        for name, digest in files.items():
            if (found := sha256_file(folder / name)) != digest:
                raise ValueError(
                    f"{folder / name} is damaged: its sha256 differs from the one in {MANIFEST}; if it was edited on "
                    f"purpose, put {found} there"
                )
        self.config = read_config(folder)
        check_counts(str(folder), self.config, len(entries), _experts(entries))
        self.arrays = arrays_of(self.config)
        _check_entries(folder, entries, self.arrays)
        self.dtypes = {path: BY_NAME[entries[path]["dtype"]] for path in self.arrays}
        self._chunk_shapes = {path: tuple(entries[path]["chunk"]) for path in self.arrays}
        self._digests = {path: entries[path]["sha256"] for path in self.arrays}
        for path, array in self.arrays.items():
            expected = zarr_json(array.shape, self._chunk_shapes[path], self.dtypes[path])
            if (where := folder / "params" / path / "zarr.json").read_bytes() != expected:
                raise ValueError(f"{where} is damaged: it does not describe array {path} of {MANIFEST}")

    def chunks(self, path: str) -> list[Chunk]:
        return list(chunks_of(self.arrays[path].shape, self._chunk_shapes[path]))

    def read(self, path: str, start: int, out: np.ndarray) -> None:
        chunks = self.chunks(path)
        digests = {chunk.start: digest for chunk, digest in zip(chunks, self._digests[path], strict=True)}
        fill(out, start, chunks, lambda chunk, numbers: self._read_chunk(path, chunk, digests[chunk.start], numbers))

    def _read_chunk(self, path: str, chunk: Chunk, digest: str, numbers: np.ndarray) -> None:
        file = chunk_file(self.folder, path, chunk)
        padding = bytearray(_padding(chunk, self._chunk_shapes[path]) * numbers.itemsize)
        read_at(file, 0, as_bytes(numbers), memoryview(padding), whole=True)
        if sha256(numbers, padding) != digest:
            raise ValueError(f"array {path} is damaged: the sha256 of {file} differs from the one in {MANIFEST}")


class NativeSink:
    """Writes the arrays of a checkpoint of ours, chunk by chunk in any order.

    Args:
      folder: where to write.
      arrays: the arrays of the model.
      dtypes: of each array, by path.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Array], dtypes: dict[str, np.dtype]):
        self.folder, self.arrays, self.dtypes = folder, arrays, dtypes
        self.chunk_shapes = {path: chunk_shape(array.shape, dtypes[path].itemsize) for path, array in arrays.items()}
        for path, array in arrays.items():
            directory = folder / "params" / path
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "zarr.json").write_bytes(zarr_json(array.shape, self.chunk_shapes[path], dtypes[path]))

    def chunks(self, path: str) -> list[Chunk]:
        return list(chunks_of(self.arrays[path].shape, self.chunk_shapes[path]))

    def write(self, path: str, chunk: Chunk, numbers: np.ndarray) -> None:
        """Writes the file of one chunk; numbers are flat and of the array's dtype. Raises OSError."""
        file = chunk_file(self.folder, path, chunk)
        file.parent.mkdir(parents=True, exist_ok=True)
        padding = bytes(_padding(chunk, self.chunk_shapes[path]) * numbers.itemsize)
        write_at(file, 0, as_bytes(numbers), padding, whole=True)

    def read(self, path: str, chunk: Chunk) -> np.ndarray:
        """What the file of one chunk now holds: flat, of the array's dtype. Raises ValueError or OSError."""
        numbers = np.empty(chunk.stop - chunk.start, self.dtypes[path])
        padding = bytearray(_padding(chunk, self.chunk_shapes[path]) * numbers.itemsize)
        read_at(chunk_file(self.folder, path, chunk), 0, as_bytes(numbers), memoryview(padding), whole=True)
        if any(padding):
            raise ValueError(f"{chunk_file(self.folder, path, chunk)} is damaged behind its numbers")
        return numbers

    def digest(self, path: str, chunk: Chunk, numbers: np.ndarray) -> str:
        """sha256 of the file that `write` makes of `numbers`."""
        return sha256(numbers, bytes(_padding(chunk, self.chunk_shapes[path]) * numbers.itemsize))

    def finish(self, digests: Mapping[str, list[str]]) -> None:
        """Writes Orbax's metadata, then the manifest, which covers all that is in the folder by now. Raises OSError."""
        (self.folder / _ORBAX_FILES[0]).write_text(json.dumps(_orbax_tree(self.arrays)))
        (self.folder / _ORBAX_FILES[1]).write_text(json.dumps(_ORBAX_CHECKPOINT))
        names = [path.name for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        names = [*sorted(set(names) - {MANIFEST}), *_ORBAX_FILES]
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "files": {name: sha256_file(self.folder / name) for name in names},
            "arrays": {
                path: {
                    "dtype": self.dtypes[path].name,
                    "shape": array.shape,
                    "chunk": self.chunk_shapes[path],
                    "sha256": digests[path],
                }
                for path, array in self.arrays.items()
            },
        }
        (self.folder / MANIFEST).write_text(json.dumps(manifest))


def chunk_file(folder: Path, path: str, chunk: Chunk) -> Path:
    return folder.joinpath("params", path, "c", *map(str, chunk.key))


def zarr_json(shape: Shape, chunk: Shape, dtype: np.dtype) -> bytes:
    """zarr 3's description of an array whose chunk files are plain little-endian numbers in C order."""
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0.0,
        }
    ).encode()


def _padding(chunk: Chunk, shape: Shape) -> int:
    """zarr stores the last chunk in full size; how many numbers it has too many."""
    return math.prod(shape) - (chunk.stop - chunk.start)


def _read_manifest(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{path} is not the manifest of a {_FORMAT}")
    if type(manifest.get("version")) is not int or manifest["version"] != _VERSION:
        raise ValueError(f"{path} is of version {brief(manifest.get('version'))}, this program reads {_VERSION}")
    files, arrays = manifest.get("files"), manifest.get("arrays")
    if (
        not isinstance(files, dict)
        or not {"config.json", *_ORBAX_FILES} <= files.keys()
        or not isinstance(arrays, dict)
    ):
        raise ValueError(f"{path} is damaged: its list of files or arrays is missing")
    if outside := [name for name in files if name not in _ORBAX_FILES and not _PLAIN_NAME.fullmatch(name)]:
        raise ValueError(f"{path} names a file outside its folder: {brief(outside[0])}")
    return files, arrays


def _experts(entries: Mapping[str, Any]) -> int:
    """How many experts the arrays in a manifest have at most."""
    shapes = [entry.get("shape") for path, entry in entries.items() if ".moe." in path and isinstance(entry, dict)]
    return max((shape[0] for shape in shapes if isinstance(shape, list) and shape and type(shape[0]) is int), default=0)


def _check_entries(folder: Path, entries: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    def fits(entry: Any, array: Array) -> bool:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "chunk", "sha256"}:
            return False
        dtype, shape, chunk, digests = entry["dtype"], entry["shape"], entry["chunk"], entry["sha256"]
        return (
            isinstance(dtype, str)
            and dtype in BY_NAME
            and shape == list(array.shape)
            and is_chunk_shape(array.shape, chunk)
            and isinstance(digests, list)
            and len(digests) == math.prod(-(-side // part) for side, part in zip(array.shape, chunk, strict=True))
        )

    kinds = {
        "arrays missing": [path for path in arrays if path not in entries],
        "unknown arrays": [brief(path) for path in entries if path not in arrays],
        "not as config.json has them": [
            p for p, array in arrays.items() if p in entries and not fits(entries[p], array)
        ],
    }
    if any(kinds.values()):
        raise ValueError(f"{folder}: {MANIFEST} and config.json disagree: {listing(kinds)}")


# Orbax 0.12's own description of a PyTree checkpoint; key type 2 is a dict key. "np.ndarray" lets it restore anywhere,
# while "jax.Array" would demand the devices that the arrays were saved from.
def _orbax_tree(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {
        "tree_metadata": {
            str(tuple(path.split("."))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path.split(".")],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for path in arrays
        },
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


_ORBAX_CHECKPOINT: dict[str, Any] = {
    "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
    "metrics": {},
    "performance_metrics": {},
    "init_timestamp_nsecs": None,
    "commit_timestamp_nsecs": None,
    "custom_metadata": {},
}
