"""Files as the converter needs them: reads and writes that are whole, JSON that is strict, folders that last."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.json_object import JSON_LIMIT, parse_json, printable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def as_bytes(numbers: np.ndarray) -> memoryview:
    """The memory of a contiguous array, whatever its dtype (memoryview itself knows no bfloat16)."""
    return numbers.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of the system that name no file, as those of reading and writing, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_at(
    path: Path, offset: int, *buffers: memoryview, unchanged: os.stat_result | None = None, whole: bool = False
) -> None:
    """Fills `buffers` from byte `offset` of a file on.

    Read, not mapped: mapped pages would count as the process's memory and could vanish under a live array.

    Raises:
      ValueError: if the file ends too early, or goes on after the last buffer though `whole` says that it must not, or
        is no longer the one that `unchanged` describes.
      OSError: if it cannot be read.
    """
    with naming(path), opened(path, os.O_RDONLY) as descriptor:
        if unchanged is not None and identity(os.fstat(descriptor)) != identity(unchanged):
            raise ValueError(f"{path} changed while it was being read; try again once nobody writes to it")
        for buffer in buffers:
            while buffer:
                count = os.preadv(descriptor, [buffer], offset)
                if not count:
                    raise ValueError(f"{path} is truncated: it ends {len(buffer)} bytes too early")
                buffer, offset = buffer[count:], offset + count
        if whole and (size := os.fstat(descriptor).st_size) != offset:
            raise ValueError(f"{path} is damaged: it has {size} bytes, expected {offset}")


def write_at(path: Path, offset: int, *buffers: bytes | memoryview, whole: bool = False) -> None:
    """Writes `buffers` in a row from byte `offset` on, creating the file, and waits until the disk has them.

    Nothing else is left behind them if `whole`.
    """
    with naming(path), opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        for data in buffers:
            buffer = memoryview(data)
            while buffer:
                count = os.pwrite(descriptor, buffer, offset)
                buffer, offset = buffer[count:], offset + count
        if whole:
            os.ftruncate(descriptor, offset)
        os.fsync(descriptor)


def write_whole(path: Path, content: bytes, through: Path | None = None) -> None:
    """Writes a file that is whole after any crash too: the new one, or what was there before.

    Args:
      through: a folder, of the same file system, where a crash may leave a part of it; by default that of `path`.

    Raises:
      OSError: if it cannot be written.
    """
    beside = (through or path.parent) / f"{path.name}.{os.getpid()}"
    try:
        write_at(beside, 0, content, whole=True)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identity(status: os.stat_result) -> dict[str, int]:
    """What tells a file's state, cheaply: the time of change cannot be set back, as that of modification can."""
    return {
        "size": status.st_size,
        "time of modification": status.st_mtime_ns,
        "time of change": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def sha256(numbers: np.ndarray, padding: bytes | bytearray = b"") -> str:
    digest = hashlib.sha256(as_bytes(numbers))
    digest.update(padding)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """The first `limit` bytes of a file; all of it if it is shorter. Raises OSError."""
    with naming(path), path.open("rb") as file:
        return file.read(limit)


def sync_tree(folder: Path) -> None:
    """Waits until everything under `folder`, names included, is on the disk."""
    for directory, _, names in os.walk(folder):
        for name in (*names, "."):
            sync(Path(directory, name))


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk. Raises OSError."""
    with naming(path), opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ~ or ~user replaced by that home.

    Raises:
      ValueError: if there is no such user, or the path is empty.
    """
    try:
        if os.fspath(path):
            return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{shown(path)}: there is no such user; write the folder's path in full") from None
    raise ValueError("the path of a folder is empty")


def read_json(path: Path) -> Any:
    """The value of a small JSON file.

    Raises:
      ValueError: as `parse_json`, or if the file is missing or longer than JSON_LIMIT.
    """
    try:
        text = first_bytes(path, JSON_LIMIT + 1)
    except FileNotFoundError:
        raise ValueError(f"{shown(path)} is missing") from None
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path} is longer than {JSON_LIMIT} bytes")
    return parse_json(text, str(path))


def shown(path: str | os.PathLike[str], limit: int = 300) -> str:
    """A path, safe to print: as it is if it is printable, and not long."""
    text = printable(os.fspath(path))
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def listing(kinds: Mapping[str, list[str]], limit: int = 8) -> str:
    """'2 tensors missing (a, b); 1 unexpected (c)': what went wrong, by kind, at most `limit` examples of each."""
    return "; ".join(
        f"{len(found)} {kind} ({', '.join(found[:limit])}{', ...' if len(found) > limit else ''})"
        for kind, found in kinds.items()
        if found
    )
