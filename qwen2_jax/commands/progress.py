"""Progress of work that is counted: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def count_progress(what: str, done: int, total: int, quiet: bool = False) -> Iterator[Callable[[int, str], None]]:
    """Gives a function to call with how many more are done and what they were; it reports on standard error.

    Args:
      what: of what there are so many, in the plural.
      done: how many an earlier run has done.
      total: how many there are.
      quiet: report nothing.
    """
    if quiet or done == total:
        yield lambda more, which: None
    elif sys.stderr.isatty():
        with _bar(what, done, total) as update:
            yield update
    else:
        yield _lines(what, done, total)


@contextlib.contextmanager
def _bar(what: str, done: int, total: int) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{what}:"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        bar.console.show_cursor(True)  # who interrupts the process on the spot gets the terminal back as it was
        task = bar.add_task("", total=total, completed=done)
        yield lambda more, which: bar.update(task, advance=more, description=which)


def _lines(what: str, done: int, total: int) -> Callable[[int, str], None]:
    last = time.monotonic()

    def update(more: int, which: str) -> None:
        nonlocal done, last
        done += more
        if done == total or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{what}: {done} of {total} ({which})", file=sys.stderr, flush=True)

    return update
