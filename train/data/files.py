"""Which files a source names, and of what kind they are."""

import glob
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from convert.files import expanded, shown

KINDS = ("jsonl", "parquet", "arrow", "array_record", "text")

_KIND_OF = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSION_OF = {".gz": "gzip", ".zst": "zstd"}


class DataFile(NamedTuple):
    path: str
    """Absolute."""
    kind: str
    """One of KINDS."""
    compression: str
    """`gzip`, `zstd`, or none; only of jsonl and text."""
    size: int
    """In bytes."""
    modified: int
    """When, in nanoseconds since 1970."""


def find_files(
    sources: Sequence[str], kind: str | None = None, left_out: Callable[[Path], object] = lambda path: None
) -> list[DataFile]:
    """The files that `sources` name: files, globs (`**` for any depth), and folders, walked in order of names.

    A folder yields the files whose names tell their kind (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .feather,
    .array_record, .txt, .md), and no hidden ones; a data set that Hugging Face's `datasets` saved is such a folder. A
    file that a source names itself, or by a glob, is plain text if its name does not tell; of .json that is refused.

    Args:
      kind: of all files, whatever their names; a folder then yields all that are not hidden.
      left_out: is told each file of a folder whose name does not tell its kind.

    Raises:
      ValueError: for a source that does not exist or has no files, and for a file that is named twice.
      OSError: if a folder cannot be listed.
    """
    if not sources:
        raise ValueError("there are no sources; name files, folders or globs")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of file; known ones are {', '.join(KINDS)}")
    files = [_data_file(path, kind) for source in sources for path in _paths(source, kind, left_out)]
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file.path)
        if real in seen:
            raise ValueError(f"{shown(file.path)} is named twice, and would be read twice; name it once")
        seen.add(real)
    return files


def check_apart(place: Path, sources: Sequence[str]) -> None:
    """Raises ValueError if `place`, where something is to be written, lies in a folder of `sources`.

    What is written there would be read as a source the next time.
    """
    for source in sources:
        folder = expanded(source)
        if folder.is_dir() and place.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{shown(place)} lies in {shown(source)}, all of which is read: what is written there would be one of "
                "the sources the next time; choose a place outside it"
            )


def _paths(source: str, kind: str | None, left_out: Callable[[Path], object]) -> Iterator[Path]:
    path = expanded(source)
    if path.is_dir():
        yield from _in_folder(path, kind, left_out)
    elif path.exists():
        yield path
    elif glob.has_magic(str(path)):
        found = [place for place in sorted(map(Path, glob.glob(str(path), recursive=True))) if not place.is_dir()]
        if not found:
            raise ValueError(f"no file is called {shown(source)}")
        yield from found
    else:
        raise ValueError(f"{shown(source)} does not exist; name a file, a folder or a glob")


def _in_folder(folder: Path, kind: str | None, left_out: Callable[[Path], object]) -> Iterator[Path]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(f"{shown(folder)} holds several splits ({', '.join(splits)}); name one, as in {folder}/train")
    found, others = False, 0
    for path in _saved_data_set(folder) or _walk(folder):
        if kind is None and _kind_of(path)[0] is None:
            others += 1
            left_out(path)
            continue
        found = True
        yield path
    if not found:
        what = f"only {others} {'file' if others == 1 else 'files'} of unknown kinds" if others else "no files"
        raise ValueError(
            f"{shown(folder)} holds {what}; known are {', '.join(_KIND_OF)}. `train tokenize --kind` says "
            "what they are; a glob, such as 'folder/**/*.py', names plain text"
        )


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _saved_data_set(folder: Path) -> list[Path]:
    """The files of `datasets.Dataset.save_to_disk`, in their order; none if the folder is something else."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _data_file(path: Path, kind: str | None) -> DataFile:
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown(path)} is no regular file, and could not be read twice; write it to one first")
    by_name, compression = _kind_of(path)
    if (kind or by_name) is None and _suffix(path) == ".json":
        raise ValueError(
            f"{shown(path)} would be read as plain text, braces and keys included; if each of its lines is a record, "
            "name it .jsonl, and if text is what you mean, `train tokenize --kind text` reads it so"
        )
    return DataFile(os.path.abspath(path), kind or by_name or "text", compression, status.st_size, status.st_mtime_ns)


def _kind_of(path: Path) -> tuple[str | None, str]:
    compression = _COMPRESSION_OF.get(path.suffix.lower(), "")
    kind = _KIND_OF.get(_suffix(path))
    if compression and kind not in ("jsonl", "text"):
        kind = None
    return kind, compression


def _suffix(path: Path) -> str:
    """In lower case, that of the compression left out."""
    bare = path.with_suffix("") if path.suffix.lower() in _COMPRESSION_OF else path
    return bare.suffix.lower()
