"""safetensors files: a stricter reader of headers than the format's own library, and headers to write.

Format: an unsigned 64-bit little-endian length, that many bytes of JSON ({name: {dtype, shape, data_offsets}}, perhaps
"__metadata__"), then the tensors' bytes without gaps. The library also accepts duplicate keys and unknown fields; here
everything that could be read in two ways is refused.
Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.dtypes import SAFETENSORS, SAFETENSORS_NAME
from convert.files import as_bytes, read_at
from convert.names import Shape
from qwen2_jax.json_object import JSON_LIMIT, brief, parse_json


class Tensor(NamedTuple):
    dtype: np.dtype
    shape: Shape
    begin: int
    """Offset of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One .safetensors file whose header was found sound.

    Raises:
      ValueError: naming the file and the fault, unless every byte of the file is accounted for by a well-formed header.
      OSError: if it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.status = os.stat(path)
        try:
            self.tensors = _parse_header(path, self.status.st_size)
        except ValueError as error:
            raise ValueError(f"{path} is not a sound safetensors file: {error}") from None

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out` (flat, of the tensor's dtype) with the tensor's numbers from `start` on."""
        tensor = self.tensors[name]
        read_at(self.path, tensor.begin + start * tensor.dtype.itemsize, as_bytes(out), unchanged=self.status)


def header(tensors: Mapping[str, tuple[np.dtype, Shape]]) -> tuple[bytes, dict[str, int]]:
    """What precedes the data in a file of `tensors`, and the offset of each tensor in that file.

    Byte for byte what the safetensors library writes for PyTorch: wider dtypes first, then by name; padded to 8 bytes.
    """
    order = sorted(tensors, key=lambda name: (-_RANK[SAFETENSORS_NAME[tensors[name][0]]], name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_NAME[dtype], "shape": list(shape), "data_offsets": [position, end]}
        begins[name], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}


_RANK = {"F16": 0, "BF16": 1, "F32": 2}  # the library's order of dtypes


def _parse_header(path: Path, file_size: int) -> dict[str, Tensor]:
    if file_size < 8:
        raise ValueError(f"it has {file_size} bytes, the length of its header alone takes 8")
    prefix = bytearray(8)
    read_at(path, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > JSON_LIMIT:
        raise ValueError(f"its header claims {length} bytes, more than the {JSON_LIMIT} that are allowed")
    if length > file_size - 8:
        raise ValueError(f"it is truncated: its header claims {length} bytes, {file_size - 8} follow")
    text = bytearray(length)
    read_at(path, 8, memoryview(text))
    if not text.startswith(b"{"):
        raise ValueError("its header does not start with '{'")
    entries = parse_json(bytes(text), "its header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of texts")
    tensors = {name: _tensor(name, entry, 8 + length) for name, entry in entries.items()}
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != position:
            fault = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
            raise ValueError(f"tensor {brief(name)} {fault}")
        position += tensor.nbytes
    if position > file_size:
        raise ValueError(f"it is truncated: its tensors end at byte {position}, the file at {file_size}")
    if position < file_size:
        raise ValueError(f"{file_size - position} bytes follow its last tensor")
    return tensors


def _tensor(name: str, entry: Any, data: int) -> Tensor:
    """Checks one entry of a header; `data` is the offset at which the tensors begin."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {brief(name)} must have exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        raise ValueError(f"tensor {brief(name)} has dtype {brief(dtype)}; weights can be {', '.join(SAFETENSORS)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape):
        raise ValueError(f"tensor {brief(name)} has shape {brief(shape)}, expected a list of whole numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {brief(name)} has data_offsets {brief(offsets)}, expected two whole numbers")
    tensor = Tensor(SAFETENSORS[dtype], tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(
            f"tensor {brief(name)} has data_offsets {brief(offsets)}, but {dtype} {brief(shape)} takes "
            f"{brief(tensor.nbytes)} bytes"
        )
    return tensor


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
