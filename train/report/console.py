"""Records for people: a live display with the lines of past intervals above it, or the lines alone.

A line of an interval is `step 120/1000` and names with values, separated by single spaces, always all of them and in
the order of `columns`; "-" stands for what is not known. A line of an event is `event`, its name, and names with
values. A terminal gets the same lines, without what is not known.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TextIO

from qwen2_jax.json_object import printable
from train.report.output import Output, Record


def console(stream: TextIO, total_steps: int, first_step: int) -> Output:
    """The console's output on `stream`: live on a terminal, lines elsewhere."""
    if stream.isatty():
        from train.report.live import Live

        return Live(stream, total_steps, first_step)
    return Lines(stream, total_steps)


class Lines:
    """One line per interval and event, for a file or a pipe."""

    def __init__(self, stream: TextIO, total_steps: int):
        self._stream, self._total = stream, total_steps

    def start(self, facts: Mapping[str, str]) -> None:
        for name, value in facts.items():
            self._print(f"{name}: {printable(value)}")

    def tick(self, step: int) -> None:
        pass

    def step(self, record: Record) -> None:
        self._print(interval_line(record, self._total))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        self._print(event_line(name, fields))

    def close(self, failed: bool = False) -> None:
        pass

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def interval_line(record: Record, total_steps: int, whole: bool = True) -> str:
    """One interval, for people and for grep; unless `whole`, without what is not known."""
    pairs = [f"{name} {value}" for name, value in columns(record) if whole or value != "-"]
    return " ".join([f"step {record['step']}/{total_steps}", *pairs])


def columns(record: Record) -> list[tuple[str, str]]:
    """What the console shows of a record, by name: always the same names in the same order."""
    return [
        ("loss", _number(record.get("loss"), ".4f")),
        ("val_loss", _number(record.get("validation_loss"), ".4f")),
        ("grad_norm", _number(record.get("gradient_norm"), ".4g")),
        ("lr", _number(record.get("learning_rate"), ".2e")),
        ("tokens_per_s", _number(record.get("tokens_per_second"), ".0f")),
        ("mfu", _number(record.get("mfu"), ".1%")),
        ("mfu_6n", _number(record.get("mfu_6n"), ".1%")),
        ("data_wait", _number(record.get("data_wait_share"), ".1%")),
        ("memory", _number(record.get("device_memory"), "GiB")),
        ("skipped", _number(record.get("skipped"), ".0f")),
        ("eta", duration(record.get("eta"))),
    ]


def event_line(name: str, fields: Mapping[str, Any]) -> str:
    """One event, for people and for grep; a text with spaces in it is quoted as in JSON."""
    return " ".join(["event", name, *(f"{key} {_value(value)}" for key, value in fields.items())])


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, as 26:03:09; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _number(value: float | int | None, form: str) -> str:
    if value is None:
        return "-"
    if form == "GiB":
        return f"{value / 2**30:.2f}GiB"
    if form == ".4f" and math.isfinite(value) and abs(value) >= 1e6:  # a loss that explodes must not fill the screen
        form = ".4e"
    return format(value, form)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = printable(str(value))
    return text if text and not any(c.isspace() or c == '"' for c in text) else json.dumps(text, ensure_ascii=False)
