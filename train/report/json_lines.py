"""Records as JSON objects, one on a line: on standard output for programs, and in a file (`train.report.metrics_file`).

An interval has no "event" key. Numbers that are not finite are null, for JSON has no NaN.
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from train.report.output import Record


class JsonLines:
    """Prints them."""

    def __init__(self, first_step: int):
        """
        Args:
          first_step: that the run goes on from.
        """
        self._first = first_step

    def start(self, facts: Mapping[str, str]) -> None:
        self._take({"event": "start", "step": self._first, "time": time.time(), "facts": dict(facts)})

    def tick(self, step: int) -> None:
        pass

    def step(self, record: Record) -> None:
        self._take(record)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        self._take({"event": name, "time": time.time(), **fields})

    def close(self, failed: bool = False) -> None:
        pass

    def _take(self, record: Mapping[str, Any]) -> None:
        valid = {name: _valid(value) for name, value in record.items()}
        self._write(json.dumps(valid, allow_nan=False, default=str))

    def _write(self, line: str) -> None:
        print(line, flush=True)


def _valid(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
