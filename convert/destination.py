"""What stands where a checkpoint is to appear: may it be replaced, and is it what was asked for already."""

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.files import read_json, shown
from convert.folder import CARRIED
from convert.hugging_face import INDEX
from convert.native import MANIFEST
from qwen2_jax.json_object import brief

RECEIPTS = ".receipts.jsonl"
"""In a folder of unfinished work, and in no other: see `convert.workspace`."""
FINISHED = ".conversion.json"
"""In a finished folder: what was made of what, and the size of every file."""

_NAMES = frozenset({"config.json", MANIFEST, INDEX, RECEIPTS, FINISHED, *CARRIED})
_ARRAYS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|params/(_METADATA|_CHECKPOINT_METADATA|[\w.]+/(zarr\.json|c(/\d+)+))", re.ASCII
)

_ELSEWHERE = "choose another place, or pass --overwrite to replace it"


def work_folder(destination: Path) -> Path:
    return destination.parent / f"{destination.name}.partial"


def check_apart(place: Path, paths: Iterable[Path]) -> None:
    """Raises ValueError if one of `paths`, which are to be read, is or lies in the folder `place`, to be replaced."""
    if not place.exists():
        return
    for path in paths:
        real = Path(os.path.realpath(path))
        # By identity, not by name: the same folder may be mounted in two places.
        if any(folder.exists() and folder.samefile(place) for folder in (real, *real.parents)):
            what = "is the source itself" if real == place else f"holds the source {shown(path)}"
            raise ValueError(f"{shown(place)} {what} and would be replaced; choose another destination")


def check_destination(destination: Path, overwrite: bool) -> None:
    """
    Raises:
      ValueError: if `destination` exists and may not be replaced: `overwrite` was not given, or it is no checkpoint, or
        it holds anything that checkpoints do not have.
      OSError: if one of its folders cannot be listed.
    """
    where = shown(destination)
    if os.path.ismount(destination):
        raise ValueError(f"{where} is a mount point, which cannot be replaced; name a folder in it")
    if not has_content(destination):
        return
    if not overwrite:
        raise ValueError(f"{where} exists already; {_ELSEWHERE}")
    names = set(os.listdir(destination)) if destination.is_dir() else set()
    weights = MANIFEST in names or any(name.endswith(".safetensors") for name in names)
    if FINISHED not in names and not ("config.json" in names and weights):
        raise ValueError(f"{where} is not a checkpoint; overwriting replaces nothing else")
    if foreign := _foreign(destination):
        more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        raise ValueError(
            f"{where} holds what no checkpoint has ({', '.join(map(brief, foreign[:4]))}{more}), which overwriting "
            "would delete; move it away, or choose another place"
        )


def has_content(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


def write_finished(folder: Path, task: Mapping[str, Any]) -> None:
    """Notes in `folder`, which is complete, that it is what `task` makes. Raises OSError."""
    own = {RECEIPTS, FINISHED}
    files = {name: (folder / name).stat().st_size for name in _files(folder) if name not in own}
    (folder / FINISHED).write_text(json.dumps({"task": task, "files": files}))


def is_finished(destination: Path, task: Mapping[str, Any]) -> bool:
    """Whether `destination` is what `task` makes. Looks at every file's size, not into it.

    Raises:
      ValueError: if it was that once, and files are gone or have another size; or if it was made of something else.
    """
    try:
        note = read_json(destination / FINISHED)
        made, files = dict(note["task"]), dict(note["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return False  # not made by us, or not to be recognized any more
    if made != task:
        raise ValueError(f"{shown(destination)} exists already, made differently ({changes(made, task)}); {_ELSEWHERE}")
    damaged = [name for name, size in files.items() if _size(destination / name) != size]
    if damaged:
        raise ValueError(
            f"{shown(destination)} exists already, but {len(damaged)} of its files are gone or of another size (such "
            f"as {brief(damaged[0])}); {_ELSEWHERE}"
        )
    return True


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two tasks differ, as 'dtype: None then, float32 now'; of files, which properties."""
    parts = []
    other_files = before.get("source") != now.get("source")  # then all differ, which tells nothing
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old == new or (key == "files" and other_files):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            for name in dict.fromkeys([*old, *new]):
                a, b = old.get(name), new.get(name)
                if isinstance(a, dict) and isinstance(b, dict):
                    parts += [f"'{shown(name)}' has another {', '.join(k for k in b if a.get(k) != b[k])}"] * (a != b)
                elif a != b:
                    parts.append(f"'{shown(name)}' is {'new' if a is None else 'gone' if b is None else 'changed'}")
        else:
            parts.append(f"{key}: {brief(old)} then, {brief(new)} now")
    return "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more" if len(parts) > 4 else "")


def _files(folder: Path) -> list[str]:
    """Every file and link under `folder`, relative to it. Raises OSError for what cannot be listed."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for where, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [os.path.relpath(os.path.join(where, name), folder) for name in (*links, *names)]
    return sorted(found)


def _foreign(folder: Path) -> list[str]:
    return [name for name in _files(folder) if name not in _NAMES and not _ARRAYS.fullmatch(name)]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None


def taken(error: OSError) -> bool:
    """Whether a rename failed because something else is where it goes to."""
    return error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
