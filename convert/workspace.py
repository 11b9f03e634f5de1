"""A folder that appears only when complete: work happens beside it, outlives a crash, and is renamed at the end.

Work on X happens in X.partial, a list of receipts in it: its first line says for which destination and task, then comes
a line per finished part. Publishing ends with the removal of that list, so that a finished checkpoint, whatever its
name, is never taken for unfinished work.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from convert.destination import (
    RECEIPTS,
    changes,
    check_destination,
    has_content,
    taken,
    work_folder,
    write_finished,
)
from convert.files import FULL, shown, sync, sync_tree

_SYNC_EVERY = 64  # receipts; those lost to a power cut only cost their work again
_ASIDE = ".replaced-"  # begin of the name that an older checkpoint has while the new one takes its place


class Workspace:
    """The work folder of one destination, locked by this process. Made by `open_workspace`."""

    def __init__(self, destination: Path, task: dict[str, Any], overwrite: bool, descriptor: int):
        self.destination, self.folder = destination, work_folder(destination)
        self.receipts: dict[str, dict[str, Any]] = {}
        """What earlier runs of the same work finished, by part. A claim: the files may have been damaged since."""
        self.discarded = ""
        """Why the work of an earlier run was thrown away, if it was."""
        self.resumed = self.published = False
        self._task, self._overwrite = task, overwrite
        self._descriptor, self._unsynced = descriptor, 0

    def note(self, part: str, receipt: dict[str, Any]) -> None:
        """Records that `part` is finished. Raises OSError."""
        self.receipts[part] = receipt
        _append(self._descriptor, {"part": part, "receipt": receipt})
        self._unsynced += 1
        if self._unsynced == _SYNC_EVERY:
            os.fsync(self._descriptor)
            self._unsynced = 0

    def publish(self) -> None:
        """Makes the work folder the destination, in place of an older checkpoint if that is allowed.

        Raises:
          ValueError: if something has appeared at the destination meanwhile that may not be replaced.
          OSError: if it cannot be written.
        """
        write_finished(self.folder, self._task)
        sync_tree(self.folder)
        aside = None
        try:
            check_destination(self.destination, self._overwrite)
            if self._overwrite and has_content(self.destination):
                aside = self._move_aside()
                check_destination(aside, self._overwrite)  # nothing can be added to it any more
            os.rename(self.folder, self.destination)  # replaces nothing but an empty folder
        except (ValueError, OSError) as error:
            if aside is not None:
                with contextlib.suppress(OSError):
                    os.rename(aside, self.destination)
            if isinstance(error, ValueError) or taken(error):
                raise ValueError(
                    f"{shown(self.destination)} changed while the work was done, and is not replaced; move it away, "
                    "and run the same command again"
                ) from None
            raise
        self.published = True
        sync(self.destination.parent)
        remove_leftovers(self.destination)

    def resume(self) -> None:
        """Takes over what an earlier run left in the folder: its receipts if the task is the same, else nothing."""
        journal = _read_journal(self.folder)
        _restore(self.destination, journal.aside)
        check_destination(self.destination, self._overwrite)
        header = {"destination": self.destination.name, "task": self._task}
        if journal.header == header:
            os.ftruncate(self._descriptor, journal.sound_bytes)
            self.receipts, self.resumed = journal.receipts, True
            return
        if journal.receipts and journal.header:
            why = changes(journal.header["task"], self._task)
            self.discarded = f"unfinished work in {shown(self.folder)} was for another task and was thrown away: {why}"
        self.resumed = True
        for path in self.folder.iterdir():
            if path.name != RECEIPTS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        os.ftruncate(self._descriptor, 0)  # not earlier: files without a header would be taken for somebody else's
        _append(self._descriptor, header)
        os.fsync(self._descriptor)
        sync(self.folder)

    def _move_aside(self) -> Path:
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=self.destination.parent))
        _append(self._descriptor, {"aside": aside.name})  # a crash from here on can be told from a foreign folder
        os.fsync(self._descriptor)
        try:
            os.rename(self.destination, aside)
        except OSError:
            aside.rmdir()
            raise
        return aside


@contextlib.contextmanager
def open_workspace(destination: Path, task: dict[str, Any], overwrite: bool = False) -> Iterator[Workspace]:
    """Opens the work folder `destination`.partial, with what an earlier run of the same `task` finished there.

    Args:
      destination: what `Workspace.publish` creates; missing, or an empty folder, or with `overwrite` a checkpoint.
      task: JSON that says what is being made from what; parts finished for another task are discarded.
      overwrite: whether a checkpoint at `destination` may be replaced, at the very end.

    Raises:
      ValueError: if something else is at `destination` or in its place of work, or another process is writing it.
      OSError: if the place cannot be written to; a full disk is named as such.
    """
    check_destination(destination, overwrite)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(destination)
    except OSError as error:
        where = shown(destination.parent)
        raise OSError(f"cannot write to {where}: {error.strerror}; choose another place") from None
    work = Workspace(destination, task, overwrite, descriptor)
    try:
        work.resume()
        yield work
    except BaseException as error:
        if work.published:
            raise
        advice = "free some space and run the same command again"
        if work.receipts:
            advice = f"what is finished is kept there: {advice}"
        elif work.resumed or not os.fstat(descriptor).st_size:
            shutil.rmtree(work.folder, ignore_errors=True)  # nothing in it is worth a second run
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(f"the disk of {shown(work.folder)} is full ({error.strerror}); {advice}") from None
        raise
    finally:
        os.close(descriptor)  # and with it the lock


def remove_leftovers(destination: Path) -> None:
    """Ends a publication, perhaps one that a crash cut off: removes the checkpoint replaced, then the receipts."""
    journal = _read_journal(destination)
    if journal.header is None or journal.header["destination"] != destination.name:
        return  # not published here
    for name in journal.aside:
        shutil.rmtree(destination.with_name(name), ignore_errors=True)
    (destination / RECEIPTS).unlink(missing_ok=True)


class _Journal(NamedTuple):
    """A list of receipts, as far as it can be believed."""

    header: dict[str, Any] | None
    """`destination` (a name) and `task`."""
    receipts: dict[str, dict[str, Any]]
    aside: list[str]
    """Names beside the destination that an older checkpoint may have been moved to."""
    sound_bytes: int


def _read_journal(folder: Path) -> _Journal:
    try:
        lines = (folder / RECEIPTS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        lines = []
    header, receipts, aside, size = None, {}, [], 0
    for line in lines:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            entry = None
        # Anything else was torn by a crash, and so is not to be believed from here on.
        match entry:
            case {"destination": str(), "task": dict()} if header is None:
                header = entry
            case {"part": str(part), "receipt": dict(receipt)} if header is not None and _is_receipt(receipt):
                receipts[part] = receipt
            case {"aside": str(name)} if header is not None and re.fullmatch(re.escape(_ASIDE) + r"\w+", name):
                aside.append(name)
            case _:
                break
        size += len(line)
    return _Journal(header, receipts, aside, size)


def _is_receipt(receipt: dict[Any, Any]) -> bool:
    counts = [receipt.get(key, {}) for key in ("nonfinite", "overflowed")]
    return isinstance(receipt.get("sha256"), str) and all(
        isinstance(count, dict) and all(type(number) is int for number in count.values()) for count in counts
    )


def _restore(destination: Path, aside: list[str]) -> None:
    """After a crash in the midst of a publication, puts the older checkpoint back."""
    for name in aside:
        place = destination.with_name(name)
        if has_content(place):
            if not os.path.lexists(destination):
                os.rename(place, destination)
        elif place.is_dir():
            place.rmdir()


def _lock(destination: Path) -> int:
    folder = work_folder(destination)
    while True:
        _check_work_folder(destination)
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / RECEIPTS, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / RECEIPTS)):
                _check_work_folder(destination)
                return descriptor
        except FileNotFoundError:
            pass  # its owner published the folder between our two calls
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another process is writing {shown(destination)}; wait for it, or stop it") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _check_work_folder(destination: Path) -> None:
    """Raises ValueError if something other than earlier work on `destination` is where the work happens."""
    folder = work_folder(destination)
    if not os.path.lexists(folder):
        return
    ours = folder.is_dir() and not folder.is_symlink() and not os.path.ismount(folder)
    if ours and any(path.name != RECEIPTS for path in folder.iterdir()):
        header = _read_journal(folder).header
        ours = header is not None and header["destination"] == destination.name
    if not ours:
        raise ValueError(
            f"{shown(folder)} is in the way: it is where the work happens, but holds something else; move it"
        )


def _append(descriptor: int, entry: dict[str, Any]) -> None:
    line = memoryview(json.dumps(entry).encode() + b"\n")
    while line:
        line = line[os.write(descriptor, line) :]
