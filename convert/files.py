"""Files as the converter needs them: reads and writes that are whole, JSON that is strict, folders that last."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

JSON_LIMIT = 10_000_000
"""Bytes of a JSON text that is read at all; the largest real one, the index of a 57B model, has 0.6 MB."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def as_bytes(numbers: np.ndarray) -> memoryview:
    """The memory of a contiguous array, whatever its dtype (memoryview itself knows no bfloat16)."""
    return numbers.reshape(-1).view(np.uint8).data


def read_at(path: Path, offset: int, *buffers: memoryview, unchanged: os.stat_result | None = None) -> None:
    """Fills `buffers` from byte `offset` of a file on.

    Read, not mapped: mapped pages would count as the process's memory and could vanish under a live array.

    Raises:
      ValueError: if the file ends too early, or is no longer the one that `unchanged` describes.
      OSError: if it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if unchanged is not None and identity(os.fstat(descriptor)) != identity(unchanged):
            raise ValueError(f"{path} changed while it was being read; try again once nobody writes to it")
        for buffer in buffers:
            while buffer:
                count = os.preadv(descriptor, [buffer], offset)
                if not count:
                    raise ValueError(f"{path} is truncated: it ends {len(buffer)} bytes too early")
                buffer, offset = buffer[count:], offset + count
    finally:
        os.close(descriptor)


def write_at(path: Path, offset: int, *buffers: bytes | memoryview) -> None:
    """Writes `buffers` in a row from byte `offset` on, creating the file, and waits until the disk has them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for data in buffers:
            buffer = memoryview(data)
            while buffer:
                count = os.pwrite(descriptor, buffer, offset)
                buffer, offset = buffer[count:], offset + count
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def sha256(numbers: np.ndarray, padding: bytes | bytearray = b"") -> str:
    digest = hashlib.sha256(as_bytes(numbers))
    digest.update(padding)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: Path) -> None:
    """Waits until everything under `folder`, names included, is on the disk."""
    for directory, _, names in os.walk(folder):
        for name in (*names, "."):
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read_json(path: Path) -> Any:
    """The value of a small JSON file.

    Raises:
      ValueError: as `parse_json`, or if the file is missing or longer than JSON_LIMIT.
    """
    try:
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path} is longer than {JSON_LIMIT} bytes")
    return parse_json(text, str(path))


def parse_json(text: bytes, what: str) -> Any:
    """Parses UTF-8 JSON as the standard has it.

    Raises:
      ValueError: naming `what`, for bytes that are not UTF-8, bad syntax, NaN or Infinity, one key given twice, or
        nesting too deep to parse.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {brief(next(k for k in keys if keys.count(k) > 1))} is given twice")
        return result

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{what}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{what}: {error}") from None


def brief(value: object, limit: int = 80) -> str:
    """`value` from a file, safe to print: one line, no control characters, not long."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[0]}"


def listing(kinds: Mapping[str, list[str]], limit: int = 8) -> str:
    """'2 tensors missing (a, b); 1 unexpected (c)': what went wrong, by kind, at most `limit` examples of each."""
    return "; ".join(
        f"{len(found)} {kind} ({', '.join(found[:limit])}{', ...' if len(found) > limit else ''})"
        for kind, found in kinds.items()
        if found
    )
