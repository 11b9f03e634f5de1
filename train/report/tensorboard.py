"""Records as TensorBoard's event files; of the package tensorboardX, which needs no TensorFlow."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import text

from train.report.output import Record

_NOT_CURVES = ("step", "time", "eta", "seconds", "tokens")


class TensorBoard:
    """Every number of a record is a curve of its name; facts and events are texts.

    tensorboardX's own SummaryWriter writes in a thread: it loses records when it is killed, and when that thread dies,
    of a full disk, the run waits for it for good. So files are written here, as records come.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        # Names of files have the second in them: a run that goes on at once must not write over the file before.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".from-{first_step}")
        self._first = first_step
        self._purge(first_step)

    def start(self, facts: Mapping[str, str]) -> None:
        table = "\n".join(["| | |", "|-|-|", *(f"| {name} | {value} |" for name, value in facts.items())])
        self._write(self._first, text("run", table))

    def tick(self, step: int) -> None:
        pass

    def step(self, record: Record) -> None:
        curves = {name: value for name, value in record.items() if value is not None and name not in _NOT_CURVES}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in curves.items()]
        self._write(record["step"], Summary(value=values))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        step = fields.get("step", self._first)
        if name == "rollback" and "to" in fields:
            self._purge(fields["to"])
        self._write(step, text(f"event/{name}", json.dumps(dict(fields), default=str)))

    def close(self, failed: bool = False) -> None:
        self._writer.close()

    def _purge(self, step: int) -> None:
        """Has TensorBoard leave out what was written of later steps."""
        log = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=log))
        self._writer.flush()

    def _write(self, step: int | float | None, summary: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()
