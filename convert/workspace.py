"""A folder that appears only when complete: work happens beside it, outlives a crash, and is renamed at the end."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.files import sync_tree

RECEIPTS = ".receipts.jsonl"
"""In the work folder: what is being made (first line), then one line per finished part, then {"complete": true}."""

_SYNC_EVERY = 64  # receipts; those lost to a power cut only cost their work again


class Workspace:
    """The work folder of one destination, locked by this process. Made by `open_workspace`."""

    def __init__(self, destination: Path, folder: Path, descriptor: int, receipts: dict[str, Any]):
        self.destination, self.folder = destination, folder
        self.receipts = receipts
        """What earlier runs of the same work finished, by part. A claim: the files may have been damaged since."""
        self._descriptor, self._unsynced = descriptor, 0

    def note(self, part: str, receipt: Any) -> None:
        """Records that `part` is finished. Raises OSError."""
        self.receipts[part] = receipt
        _append(self._descriptor, {"part": part, "receipt": receipt})
        self._unsynced += 1
        if self._unsynced == _SYNC_EVERY:
            os.fsync(self._descriptor)
            self._unsynced = 0

    def publish(self) -> None:
        """Makes the work folder the destination, in place of an older checkpoint if there is one. Raises OSError."""
        _append(self._descriptor, {"complete": True})
        sync_tree(self.folder)
        replaced = self.destination.with_name(f".{self.destination.name}.replaced")
        if _has_content(self.destination):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.destination, replaced)
        os.rename(self.folder, self.destination)
        descriptor = os.open(self.destination.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def open_workspace(destination: Path, task: dict[str, Any], overwrite: bool = False) -> Iterator[Workspace]:
    """Opens the work folder `destination`.partial, with what an earlier run of the same `task` finished there.

    Args:
      destination: what `Workspace.publish` creates; missing, or an empty folder, or with `overwrite` a checkpoint.
      task: JSON that says what is being made from what; parts finished for another task are discarded.
      overwrite: whether a checkpoint at `destination` may be replaced, at the very end.

    Raises:
      ValueError: if something else is at `destination` or in its place of work, or another process is writing it.
      OSError: if the place cannot be written to.
    """
    check_destination(destination, overwrite)
    folder = destination.with_name(f"{destination.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _has_content(folder) and not (folder / RECEIPTS).exists():
            raise ValueError(f"{folder} is in the way: it is where the work happens, but holds something else; move it")
        descriptor = _lock(destination, folder)
    except OSError as error:
        raise OSError(f"cannot write to {destination.parent}: {error.strerror}; choose another place") from None
    try:
        work = Workspace(destination, folder, descriptor, _resume(folder, descriptor, task))
        try:
            yield work
        except BaseException:
            if not work.receipts:
                shutil.rmtree(folder, ignore_errors=True)  # nothing in it is worth a second run
            raise
    finally:
        os.close(descriptor)  # and with it the lock


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises ValueError if `destination` exists and may not be replaced."""
    if not _has_content(destination):
        return
    if not overwrite:
        raise ValueError(f"{destination} exists already; choose another place, or pass --overwrite to replace it")
    weights = [*destination.glob("*.safetensors"), *destination.glob("manifest.json")] if destination.is_dir() else []
    if not weights or not (destination / "config.json").is_file():
        raise ValueError(f"{destination} is not a checkpoint; overwriting replaces nothing else")


def is_finished(destination: Path, task: dict[str, Any]) -> bool:
    """Whether `destination` is what `task` makes, complete."""
    try:
        lines = (destination / RECEIPTS).read_bytes().splitlines()
        return len(lines) > 1 and json.loads(lines[0]) == {"task": task} and json.loads(lines[-1]) == {"complete": True}
    except (OSError, ValueError):
        return False


def _has_content(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


def _lock(destination: Path, folder: Path) -> int:
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / RECEIPTS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another process is writing {destination}; wait for it, or stop it first") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / RECEIPTS)):
                check_destination(destination, overwrite=True)
                return descriptor
        os.close(descriptor)  # its owner published the folder between our two calls


def _resume(folder: Path, descriptor: int, task: dict[str, Any]) -> dict[str, Any]:
    """The receipts of an earlier run of `task`; or none, in a folder that is empty but for the new list of receipts."""
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        text = file.read()
    receipts, good = {}, 0
    for number, line in enumerate(text.splitlines(keepends=True)):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or (number == 0 and entry != {"task": task}):
            break  # torn by a crash, or other work
        good += len(line)
        if "part" in entry:
            receipts[entry["part"]] = entry["receipt"]
    os.ftruncate(descriptor, good)
    if not good:
        for path in folder.iterdir():
            if path.name != RECEIPTS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _append(descriptor, {"task": task})
    return receipts


def _append(descriptor: int, entry: dict[str, Any]) -> None:
    os.write(descriptor, json.dumps(entry).encode() + b"\n")
