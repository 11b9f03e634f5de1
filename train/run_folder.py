"""The folder of a run: its options, what started it and when, metrics, checkpoints, and data passed over."""

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from jax.experimental import multihost_utils

from convert.files import write_whole
from train.run import Run
from train.run_file import as_options, load_yaml

OPTIONS, STARTS, PASSED_OVER, CHECKPOINTS = "run.yaml", "starts.jsonl", "passed_over.json", "checkpoints"
MODEL = "model"
"""What checkpoints hold of their model, a folder for each phase."""
_LOCK = ".lock"

_PACKAGES = ("qwen2-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_FREE = frozenset(
    """
    out resume save_every keep_last keep_every wait_for_saves log_every json tensorboard wandb profile cache no_plan
    compilation_cache no_verify_data
    coordinator processes process validation_data validate_every validation_rows
    """.split()
)
"""Options that leave the numbers alone."""


_OF_DATA = frozenset("init tokenizer data weights field seq seed phases max_bad_records".split())
"""Options that say what the data is."""


class Window(NamedTuple):
    """Batches of a phase that the run passes over, from `first` up to `stop`, since it went back to a step."""

    phase: int
    first: int
    stop: int
    to: int = -1
    """The step."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps it for this run alone; a start that fails before it has written more takes it back.

    Raises:
      ValueError: if another process trains into it.
      OSError: if it cannot be written.
    """
    if jax.process_index() != 0:  # the first process answers for the others
        yield
        return
    made = _make(folder)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(descriptor, folder / _LOCK):
            raise ValueError(f"another process trains into {folder}; stop it, or choose another --out")
        try:
            yield
        except BaseException:
            # Nothing of somebody else's is in a folder that this very process made, and holds.
            if made and set(os.listdir(folder)) <= {_LOCK, MODEL}:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def note_start(
    run: Run, folder: Path, step: int, texts: Sequence[str] = (), begun: int = 0, others: Sequence[str] = ()
) -> list[str]:
    """Writes the options of this start, and where it takes place, into the folder.

    Args:
      step: that the run goes on from.
      texts: a digest of every phase's data.
      begun: so many phases were begun before.
      others: changes that no option tells of, as "name: old -> new".

    Returns:
      The options that differ from those of the start before, as "name: old -> new", of those that change numbers; and
      the others.

    Raises:
      ValueError: if the options of the start before cannot be read; or if no option says that the data of a phase
        that was begun is another one, but it is: the run would go on amid rows of text that it partly knows.
    """
    options = as_options(run)
    before = _read_options(folder / OPTIONS)
    changes = [
        f"{name}: {before[name]} -> {value}"
        for name, value in options.items()
        if name not in _FREE and name in before and before[name] != value
    ]
    known = _texts_before(folder / STARTS)
    other = next((n for n, (old, new) in enumerate(zip(known[:begun], texts, strict=False), 1) if old != new), None)
    if other is not None and not _OF_DATA.intersection(change.partition(":")[0] for change in changes):
        raise ValueError(
            f"the data of phase {other} is no longer what the run was trained on up to step {step}, though it has the "
            "same name: its text changed, or this version cuts it into other rows; bring the text or the version back, "
            "or, if the run is to go on with the new rows, give the data another name"
        )
    changes += others
    multihost_utils.sync_global_devices("start")  # what is written now, all have read as it was before
    if jax.process_index() == 0:
        write_whole(folder / OPTIONS, yaml.safe_dump(options, sort_keys=False).encode())
        start = json.dumps({"step": step, "changes": changes, "texts": [*texts]} | _circumstances())
        torn = (folder / STARTS).exists() and not (folder / STARTS).read_bytes().endswith(b"\n")
        with open(folder / STARTS, "a", encoding="utf-8") as file:
            file.write("\n" * torn + start + "\n")
    return changes


def read_windows(folder: Path) -> list[Window]:
    """One for each time that the run went back. Raises ValueError if the file is not what `add_window` writes."""
    path = folder / PASSED_OVER
    if not path.exists():
        return []
    try:
        return [Window(*map(int, entry)) for entry in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); it lists [phase, first, stop, to] of batches passed over"
        ) from None


def add_window(folder: Path, windows: list[Window], new: Window) -> list[Window]:
    """The windows with one more, noted in the folder; older ones lie in it or apart from it. Raises OSError."""
    windows = [*windows, new]
    if jax.process_index() == 0:
        write_whole(folder / PASSED_OVER, json.dumps(windows).encode())
    return windows


def position(windows: list[Window], phase: int, step: int) -> int:
    """Which batch of a phase its step takes, counted from 0 both, when the windows are passed over."""
    outermost: list[Window] = []
    for window in (window for window in windows if window.phase == phase):
        outermost = [old for old in outermost if old.stop <= window.first or window.stop <= old.first] + [window]
    for window in sorted(outermost):
        if step >= window.first:
            step += window.stop - window.first
    return step


def went_back_to(windows: list[Window], step: int) -> bool:
    """Whether the checkpoint of a step, which is there, is the one that the run last went back to, and not one that it
    has saved since it went back still further."""
    return next((window.to == step for window in reversed(windows) if window.to <= step), False)


def _make(folder: Path) -> bool:
    """Whether a folder was made by this very process. Raises OSError if it is not there, and cannot be made."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def _lock(descriptor: int, path: Path) -> bool:
    """Locks an open file; false if another process has, or has taken the file away meanwhile."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # file systems of clouds may have no locks
            raise
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _read_options(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        options = load_yaml(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML any more: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} is damaged: it no longer holds the options of the run; remove it to go on without")
    return options


def _texts_before(path: Path) -> list[str]:
    """Digests of the data at the last start; none if there was none, or it did not come to write them."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line may be torn
            return list(json.loads(line)["texts"])
    return []


def _circumstances() -> dict[str, Any]:
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": _revision(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Of the checkout that this code runs from, with a + if files were changed since; None outside one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
