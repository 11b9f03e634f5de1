"""`metrics.jsonl` of a run: every record and event, one JSON object on a line.

Lines are only ever added, by the run and by those that go on with it. A reader drops what was superseded: a "start"
event says which step a run went on from, so records of later steps above it belong to weights that were lost; likewise
a "rollback" event with `to`.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_jax.json_object import brief, parse_json
from train.report.json_lines import JsonLines

NAME = "metrics.jsonl"
_TAIL = 2**20  # bytes in which a line certainly ends


class History(NamedTuple):
    """What counts of a run, in order of steps."""

    steps: list[dict[str, Any]]
    """Intervals; each has an integer "step", larger than the one before."""
    events: list[dict[str, Any]]
    """Each has "event", its name."""


class MetricsFile(JsonLines):
    """Writes the file. A record is in the kernel's hands when a method returns: killing the process loses none."""

    def __init__(self, folder: Path, first_step: int):
        """
        Args:
          folder: of the run.
          first_step: that the run goes on from.

        Raises:
          OSError: if the file cannot be written.
        """
        super().__init__(first_step)
        self._path = folder / NAME
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._drop_torn_line()

    def close(self, failed: bool = False) -> None:
        os.close(self._file)

    def _drop_torn_line(self) -> None:
        """Of a run that died while it wrote."""
        size = os.fstat(self._file).st_size
        begin = max(0, size - _TAIL)
        whole = begin + os.pread(self._file, _TAIL, begin).rfind(b"\n") + 1
        if whole < size:
            os.ftruncate(self._file, whole)

    def _write(self, line: str) -> None:
        before = os.fstat(self._file).st_size
        try:
            rest = memoryview(line.encode() + b"\n")
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:  # a full disk, say: what comes later must not be joined to half a line
            os.ftruncate(self._file, before)
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def read_metrics(folder: Path) -> History:
    """What counts of a run's metrics: without what was superseded, and without a last line that is torn.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if there is no such run, it has no metrics yet, or a line in it is none of ours.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a run")
    if not path.exists():
        raise ValueError(f"{folder} has no {NAME}: it is no run, or one that has not come to its first interval")
    history = History([], [])
    lines = path.read_bytes().split(b"\n")[:-1]  # what stands behind the last line break is torn
    for number, line in enumerate(lines, start=1):
        _take(history, _parsed(line, f"{path}, line {number}"))
    return history


def _take(history: History, record: dict[str, Any]) -> None:
    """Adds a record, and drops those that it supersedes."""
    name = record.get("event")
    if name is None:
        _drop(history.steps, record["step"] - 1)
        history.steps.append(record)
        return
    if name == "start":
        _drop(history.steps, record.get("step", 0))
        _drop(history.events, record.get("step", 0))
    elif name == "rollback" and isinstance(record.get("to"), int):
        _drop(history.steps, record["to"])
        _drop(history.events, record["to"], keep="rollback")
    history.events.append(record)


def _drop(records: list[dict[str, Any]], after: int, keep: str | None = None) -> None:
    """Those of later steps, in place; not events of the name `keep`."""
    records[:] = [
        record for record in records if record.get("step", 0) <= after or (keep and record.get("event") == keep)
    ]


def _parsed(line: bytes, what: str) -> dict[str, Any]:
    record = parse_json(line, what)
    if not isinstance(record, dict):
        raise ValueError(f"{what}: expected an object, got {brief(record)}")
    step = record.get("step", 0 if "event" in record else None)
    if type(step) is not int:
        raise ValueError(f"{what}: a step must be a whole number, got {brief(step)}")
    return record
