"""What a long run has finished, on disk as soon as it is done, so that the same command goes on where one stopped."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines: the settings of the run, then one record for each finished piece of work.

    A line that a crash left half written is dropped. Use it as a context manager; only one process can have it open.

    Raises:
      OSError: if the file cannot be written.
      ValueError: if it belongs to a run with other settings, is in use, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False):
        """
        Args:
          path: of the file; made if it is not there.
          settings: what the records depend on.
          overwrite: begin anew, whatever the file holds.
        """
        self.records: list[dict[str, Any]] = []
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._open(path, json.loads(json.dumps(settings)), overwrite)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, *records: Mapping[str, Any]) -> None:
        """Adds records, and returns when the disk has them."""
        self._write(*records)
        self.records += map(dict, records)

    def _open(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {path}; wait for it, or choose another folder") from None
        if overwrite:
            os.ftruncate(self._file, 0)
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        if not whole:
            self._write({"settings": settings})
            return
        lines = [_parsed(line, path, number) for number, line in enumerate(content[:whole].splitlines(), start=1)]
        if (differences := _differences(lines[0].get("settings"), settings)) is not None:
            raise ValueError(
                f"{path} belongs to a run with other settings ({differences}); choose another folder, or --overwrite it"
            )
        self.records = lines[1:]

    def _write(self, *records: Mapping[str, Any]) -> None:
        data = memoryview(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged in line {number}; --overwrite begins anew")
    return value


def _differences(before: Any, now: Mapping[str, Any]) -> str | None:
    if not isinstance(before, dict):
        return "it names none"
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {_brief(before.get(name))}, now {_brief(now.get(name))}" for name in changed) or None


def _brief(value: object, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
