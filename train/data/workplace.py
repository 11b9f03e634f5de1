"""Where a token store is made: a folder beside it, locked, whose unfinished work only the same task takes up."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.destination import changes, has_content, work_folder
from convert.files import shown, write_whole
from train.data.encode import PARTS
from train.data.store import FORMAT, is_store, read_manifest

_TASK, _LOCK = "task.json", "lock"


@contextlib.contextmanager
def locked(destination: Path, task: dict[str, Any], wait: bool = False) -> Iterator[Path | None]:
    """Opens `destination`.partial for this process alone; gives None where `destination` is what `task` makes.

    A folder that holds nothing finished when an error ends the work is removed again.

    Args:
      task: JSON that says what is being made of what.
      wait: for another process that is at it, instead of an error.

    Raises:
      ValueError: if something else is at `destination` or in its place of work, or another process is writing it.
      OSError: if the place cannot be written to.
    """
    work = work_folder(destination)
    while True:
        if complete(destination, task):
            clear(destination)
            yield None
            return
        if (descriptor := _lock(work, wait)) is not None:
            break
    try:
        _take_up(work, task)
        yield work
    except BaseException:
        if work.exists() and not _has_finished(work):
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)  # and with it the lock


def complete(destination: Path, task: dict[str, Any]) -> bool:
    """Whether `destination` is what `task` makes already. Raises ValueError if it is something else."""
    if not has_content(destination):
        return False
    if not is_store(destination):
        raise ValueError(f"{shown(destination)} exists already, and is no folder of tokens; choose another place")
    made = read_manifest(destination)["task"]
    if made != task:
        raise ValueError(
            f"{shown(destination)} exists already, made differently ({changes(made, task)}); choose another place"
        )
    return True


def clear(store: Path) -> None:
    """Removes what only unfinished work needs."""
    shutil.rmtree(store / PARTS, ignore_errors=True)
    for name in (_TASK, _LOCK):
        with contextlib.suppress(OSError):  # the store may be on a disk that can only be read
            (store / name).unlink(missing_ok=True)


def _lock(work: Path, wait: bool) -> int | None:
    """None if the folder was renamed while this process waited for it."""
    _check_ours(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"cannot write to {shown(work)}: {error.strerror}; choose another place") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), os.stat(work / _LOCK)):
            return descriptor
    except FileNotFoundError:
        pass
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is writing {shown(work)}; wait for it, or stop it") from None
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _check_ours(work: Path) -> None:
    if not os.path.lexists(work):
        return
    ours = work.is_dir() and not work.is_symlink()
    if not ours or not (_read_task(work) or set(os.listdir(work)) <= {_LOCK, PARTS}):
        raise ValueError(
            f"{shown(work)} is in the way: it is where the work happens, but holds something else; move it"
        )


def _take_up(work: Path, task: dict[str, Any]) -> None:
    before = _read_task(work)
    if before is not None and before != task:
        if _has_finished(work):
            raise ValueError(
                f"{shown(work)} holds unfinished work on something else ({changes(before, task)}); remove it, or "
                "choose another place"
            )
        shutil.rmtree(work / PARTS, ignore_errors=True)
    (work / PARTS).mkdir(exist_ok=True)
    write_whole(work / _TASK, json.dumps({"format": FORMAT, "task": task}).encode(), work / PARTS)


def _read_task(work: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((work / _TASK).read_bytes())
        return dict(value["task"]) if value["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _has_finished(work: Path) -> bool:
    return any((work / PARTS).glob("*.json"))
