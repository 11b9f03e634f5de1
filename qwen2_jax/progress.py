"""Progress of long work: a bar on a terminal, a line now and then elsewhere, all of it on standard error."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from qwen2_jax.json_object import printable

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def byte_progress(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with bytes done and bytes in all.

    Args:
      what: is being done; may hold a path.
      quiet: report nothing.
    """
    what = printable(what)
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(what) as update:
            yield lambda done, total: update(completed=done, total=total)
    else:
        yield _byte_lines(what)


@contextlib.contextmanager
def count_progress(what: str, done: int, total: int, quiet: bool = False) -> Iterator[Callable[[int, str], None]]:
    """Gives a function to call with how many more are done and what they were.

    Args:
      what: of what there are so many, in the plural.
      done: how many an earlier run has done.
      total: how many there are.
      quiet: report nothing.
    """
    if quiet or done == total:
        yield lambda more, which: None
    elif sys.stderr.isatty():
        with _bar(f"{what}:", done, total, counted=True) as update:
            yield lambda more, which: update(advance=more, which=which)
    else:
        yield _count_lines(what, done, total)


@contextlib.contextmanager
def _bar(what: str, done: int = 0, total: int | None = None, counted: bool = False) -> Iterator[Callable[..., Any]]:
    """Gives rich's function to update the bar; its "which" comes last in the line."""
    from rich import progress
    from rich.console import Console

    bytes_and_rate = progress.DownloadColumn(), progress.TransferSpeedColumn()
    columns = (
        progress.TextColumn("{task.description}", markup=False),  # a path may look like markup
        progress.BarColumn(),
        *((progress.MofNCompleteColumn(),) if counted else bytes_and_rate),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[which]}", markup=False),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.console.show_cursor(True)  # who interrupts the process on the spot gets the terminal back as it was
        yield functools.partial(bar.update, bar.add_task(what, total=total, completed=done, which=""))


def _byte_lines(what: str) -> Callable[[int, int], None]:
    begin = last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - begin) / 1e6
            print(f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.0f} MB/s", file=sys.stderr, flush=True)

    return update


def _count_lines(what: str, done: int, total: int) -> Callable[[int, str], None]:
    last = time.monotonic()

    def update(more: int, which: str) -> None:
        nonlocal done, last
        done += more
        if done == total or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{what}: {done} of {total} ({which})", file=sys.stderr, flush=True)

    return update
