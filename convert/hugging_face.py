"""Hugging Face folders: config.json and weights in one or more files, read strictly, written as transformers does."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from convert.chunks import CHUNK_BYTES, Chunk, chunk_shape, chunks_of
from convert.files import as_bytes, listing, read_at, read_json, sha256, write_at
from convert.folder import check_vocabulary, json_bytes, read_config
from convert.names import IGNORED, Array, Shape, arrays_of, check_counts, kind_of, tensors_of
from convert.pickle_files import PickleFile
from convert.safetensors_files import Tensor, TensorFile, header
from qwen2_jax.json_object import brief

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class WeightFile(Protocol):
    path: Path
    tensors: dict[str, Tensor]

    def read(self, name: str, start: int, out: np.ndarray) -> None: ...


class HuggingFaceSource:
    """A Hugging Face folder, open for reading in our layout (see `convert.chunks.Source`).

    Args:
      folder: holds config.json and model.safetensors, or shards of it with their index.
      allow_pickle: read pytorch_model.bin files if there are no safetensors.

    Raises:
      ValueError: unless files, index, config.json and tokenizer are sound and fit each other exactly; tensors that are
        missing, unknown, mis-shaped or of mixed dtypes are reported together.
      OSError: if a file cannot be read.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.folder = folder
        self.config = read_config(folder)
        check_vocabulary(folder, self.config)
        self.files = _weight_files(folder, allow_pickle)
        self._file_of = {name: file for file in self.files for name in file.tensors}
        tensors = {name: file.tensors[name] for name, file in self._file_of.items()}
        fused = [tensor.shape[0] for name, tensor in tensors.items() if _is_fused(name) and tensor.shape]
        check_counts(str(folder), self.config, len(tensors), max(fused) if fused else None)
        self.arrays = arrays_of(self.config, bool(fused))
        _check_tensors(folder, tensors, self.arrays, self.config.tie_word_embeddings)
        self.dtypes = {path: tensors[array.pieces[0].name].dtype for path, array in self.arrays.items()}
        if "lm_head.weight" in tensors and self.config.tie_word_embeddings:
            self._check_tied_head()

    def chunks(self, path: str) -> list[Chunk]:
        shape = self.arrays[path].shape
        return list(chunks_of(shape, chunk_shape(shape, self.dtypes[path].itemsize)))

    def read(self, path: str, start: int, out: np.ndarray) -> None:
        for piece in self.arrays[path].overlaps(start, start + out.size):
            part = out[piece.start : piece.start + piece.size]
            self._file_of[piece.name].read(piece.name, piece.offset, part)

    def _check_tied_head(self) -> None:
        """A tied model has one matrix; a file that stores a second one must store the same numbers."""
        names = ("lm_head.weight", "model.embed_tokens.weight")
        tensors = [self._file_of[name].tensors[name] for name in names]
        problem = "differ in dtype" if tensors[0].dtype != tensors[1].dtype else None
        size, step = tensors[0].nbytes // tensors[0].dtype.itemsize, CHUNK_BYTES // tensors[0].dtype.itemsize
        for start in range(0, size if problem is None else 0, step):
            both = [np.empty(min(step, size - start), tensors[0].dtype) for _ in names]
            for name, out in zip(names, both, strict=True):
                self._file_of[name].read(name, start, out)
            if as_bytes(both[0]) != as_bytes(both[1]):
                problem = "differ"
                break
        if problem:
            raise ValueError(
                f"{self.folder}: config.json says tie_word_embeddings, but {names[0]} and {names[1]} {problem}; "
                "set it to false to keep both, or remove the tensor that is not meant"
            )


def _is_fused(name: str) -> bool:
    return name.endswith(".experts.gate_up_proj")


def _weight_files(folder: Path, allow_pickle: bool) -> list[WeightFile]:
    present = [name for name in (SINGLE, INDEX) if os.path.lexists(folder / name)]
    if len(present) == 2:
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is not the model")
    if present == [SINGLE]:
        return [TensorFile(folder / SINGLE)]
    if present == [INDEX]:
        return _indexed(folder, INDEX, ".safetensors", TensorFile)
    pickles = [name for name in (PICKLE, PICKLE_INDEX) if os.path.lexists(folder / name)]
    if not pickles:
        raise ValueError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds its weights only as {pickles[0]}, a pickle, and loading a pickle can run code that its "
            "author put there; get the safetensors files, or convert it with --allow-pickle if you trust its author"
        )
    if pickles[0] == PICKLE:
        return [PickleFile(folder / PICKLE)]
    return _indexed(folder, PICKLE_INDEX, ".bin", PickleFile)


def _indexed(folder: Path, index_name: str, suffix: str, open_file: Callable[[Path], WeightFile]) -> list[WeightFile]:
    """Opens the shards that an index lists, after checking that index and shards tell the same story."""
    path = folder / index_name
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: expected an object with a weight_map that names the file of each tensor")
    shards = set()
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or not re.fullmatch(r"[\w-][\w.-]*", shard, re.ASCII)
            or not shard.endswith(suffix)
        ):
            raise ValueError(
                f"{path}: {brief(tensor)} is said to be in {brief(shard)}; expected the plain name of a {suffix} file"
            )
        shards.add(shard)
    if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise ValueError(f"{folder}: {listing({f'of {len(shards)} weight files missing': absent})}")
    files = [open_file(folder / shard) for shard in sorted(shards)]

    holders: dict[str, list[str]] = {}
    for file in files:
        for tensor in file.tensors:
            holders.setdefault(tensor, []).append(file.path.name)
    kinds = {
        "tensors that the index lists but its file lacks": [
            brief(tensor) for tensor, shard in weight_map.items() if shard not in holders.get(tensor, ())
        ],
        "tensors that a file holds but the index lacks": [
            brief(tensor) for tensor in holders if tensor not in weight_map
        ],
        "tensors in several files": [brief(tensor) for tensor, names in holders.items() if len(names) > 1],
    }
    if any(kinds.values()):
        raise ValueError(f"{path} does not fit its files: {listing(kinds)}")
    metadata = index.get("metadata", {})
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
    if claimed is not None and claimed != actual:
        raise ValueError(f"{path}: total_size is {brief(claimed)}, but the tensors in its files have {actual} bytes")
    return files


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], arrays: Mapping[str, Array], tied: bool) -> None:
    expected = tensors_of(arrays)
    if tied and "lm_head.weight" in tensors:
        expected = {**expected, "lm_head.weight": expected["model.embed_tokens.weight"]}
    mixed = {
        path: sorted({tensors[piece.name].dtype.name for piece in array.pieces if piece.name in tensors})
        for path, array in arrays.items()
    }
    kinds = {
        "tensors missing": [name for name in expected if name not in tensors],
        "unknown tensors": [brief(name) for name in tensors if name not in expected and not IGNORED.fullmatch(name)],
        "of another shape": [
            f"{name}: {list(tensors[name].shape)} in the file, {list(shape)} by config.json"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "of several dtypes": [f"{path}: {', '.join(dtypes)}" for path, dtypes in mixed.items() if len(dtypes) > 1],
    }
    if any(kinds.values()):
        raise ValueError(f"{folder}: weights and config.json disagree: {listing(kinds)}")


class HuggingFaceSink:
    """Writes a Hugging Face folder, array by array in any order: the files exist from the start, their data follow.

    Args:
      folder: where to write.
      arrays: our arrays with the pieces they become.
      dtypes: of each array, by path.
      shard_size: bytes of tensors per file at most (a larger tensor gets a file of its own).
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Array], dtypes: dict[str, np.dtype], shard_size: int):
        self.folder = folder
        self.arrays, self.dtypes = arrays, dtypes
        of_tensor = {piece.name: dtypes[path] for path, array in arrays.items() for piece in array.pieces}
        self.tensors = {name: (of_tensor[name], shape) for name, shape in tensors_of(arrays).items()}
        self._place: dict[str, tuple[Path, int]] = {}
        shards = split({name: _nbytes(*tensor) for name, tensor in self.tensors.items()}, shard_size)
        for number, names in enumerate(shards, 1):
            several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = folder / f"model{several}.safetensors"
            head, begins = header({name: self.tensors[name] for name in names})
            self._place.update({name: (path, begin) for name, begin in begins.items()})
            write_at(path, 0, head)
            with path.open("rb+") as file:
                file.truncate(max(begins[name] + _nbytes(*self.tensors[name]) for name in names))

    def write(self, path: str, chunk: Chunk, numbers: np.ndarray) -> None:
        """Puts the numbers of one chunk (flat, of the array's dtype) into their files. Raises OSError."""
        for piece in self.arrays[path].overlaps(chunk.start, chunk.stop):
            file, begin = self._place[piece.name]
            part = numbers[piece.start : piece.start + piece.size]
            write_at(file, begin + piece.offset * part.itemsize, as_bytes(part))

    def read(self, path: str, chunk: Chunk) -> np.ndarray:
        """What the files now hold for one chunk: flat, of the array's dtype. Raises ValueError or OSError."""
        numbers = np.empty(chunk.stop - chunk.start, self.dtypes[path])
        for piece in self.arrays[path].overlaps(chunk.start, chunk.stop):
            file, begin = self._place[piece.name]
            part = numbers[piece.start : piece.start + piece.size]
            read_at(file, begin + piece.offset * part.itemsize, as_bytes(part))
        return numbers

    def digest(self, path: str, chunk: Chunk, numbers: np.ndarray) -> str:
        return sha256(numbers)

    def finish(self) -> None:
        """Writes the index, if there are several files. Raises OSError."""
        if len({path for path, _ in self._place.values()}) == 1:
            return
        sizes = {name: _nbytes(*tensor) for name, tensor in self.tensors.items()}
        parameters = sum(sizes[name] // dtype.itemsize for name, (dtype, _) in self.tensors.items())
        index = {
            "metadata": {"total_parameters": parameters, "total_size": sum(sizes.values())},
            "weight_map": {name: self._place[name][0].name for name in sorted(self.tensors)},
        }
        (self.folder / INDEX).write_bytes(json_bytes(index))


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Which tensors share a file, given each one's bytes: in order, greedily, the experts of one kind kept together.

    The same files as huggingface_hub makes of transformers' tensors, so that identical models give identical folders.
    """
    blocks: dict[str, list[str]] = {}
    for name in sizes:
        blocks.setdefault(kind_of(name), []).append(name)
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for names in blocks.values():
        size = sum(sizes[name] for name in names)
        if size > limit:
            shards.append(names)
            continue
        if filled + size > limit:
            shards.append(current)
            current, filled = [], 0
        current = current + names
        filled += size
    return [*shards, current] if current else shards


def _nbytes(dtype: np.dtype, shape: Shape) -> int:
    return Tensor(dtype, shape, 0).nbytes
