"""The display on a terminal: how far the run is and the last numbers, at the foot of the lines of past intervals."""

import time
from collections.abc import Mapping
from typing import Any, TextIO

import rich.live
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qwen2_jax.json_object import printable
from train.report.console import columns, duration, event_line, interval_line
from train.report.output import Record


class Live:
    """Also keeps what others print above the display, until it is closed."""

    def __init__(self, stream: TextIO, total_steps: int, first_step: int):
        self._total, self._done = total_steps, first_step
        self._begun = time.monotonic()
        self._record: Record = {}
        self._console = Console(file=stream)
        self._live = rich.live.Live(
            console=self._console, get_renderable=self._display, refresh_per_second=2, transient=True
        )

    def start(self, facts: Mapping[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(Text(name, style="bold"), Text(printable(value)))
        self._console.print(table)
        self._show()

    def tick(self, step: int) -> None:
        self._done = step - 1
        self._show()

    def step(self, record: Record) -> None:
        self._record, self._done = record, int(record["step"] or 0)
        self._show()
        self._live.refresh()  # or the line would be printed above the numbers before
        self._print(interval_line(record, self._total, whole=False))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        self._print(event_line(name, fields), style="yellow")

    def close(self, failed: bool = False) -> None:
        self._live.stop()

    def _print(self, line: str, style: str = "dim") -> None:
        # Not wrapped by rich: a terminal that wraps a line itself still copies it as one.
        self._console.print(Text(line, style=style), soft_wrap=True)

    def _show(self) -> None:
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor(True)  # who kills the process gets the terminal back as it was

    def _display(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {self._done}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._done, width=30),
            Text(f"{self._done / max(self._total, 1):.1%}"),
            Text(f"elapsed {duration(time.monotonic() - self._begun)}"),
        )
        pairs = [Text.assemble((f"{name} ", "dim"), value) for name, value in columns(self._record) if value != "-"]
        return Group(head, Columns(pairs, padding=(0, 2)))
