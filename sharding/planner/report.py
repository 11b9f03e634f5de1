"""Plans as tables for a terminal."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from sharding.planner.estimate import Estimate
from sharding.planner.request import Request
from sharding.planner.search import MARGIN

if TYPE_CHECKING:
    from sharding.planner.compiled import Compiled

_WIDTH = 120
"""Columns where there is no terminal to ask."""


class Sheet(NamedTuple):
    """A table before it is drawn: for a terminal here, in Markdown in the documents."""

    columns: tuple[str, ...]
    """The first is of names, the others of numbers."""
    rows: tuple[tuple[str, ...], ...]


def show(sheet: Sheet) -> None:
    """Draws a table on standard output."""
    table = Table()
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in sheet.rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def headline(request: Request) -> str:
    """What is planned, in one line."""
    how = f", remat {request.remat}, {request.optimizer}" if request.training else ""
    return (
        f"{request.model}: {request.task}, {request.batch:,} rows of {request.seq:,} tokens on {request.topology} "
        f"({request.topology.devices} devices), mesh {request.mesh}{how}"
    )


def memory_sheet(result: Estimate) -> Sheet:
    """Bytes of one device, by what they hold; what is not there is left out."""
    memory, training = result.memory, result.request.training
    rows = [
        (f"parameters ({'float32' if training else 'bfloat16'})", memory.parameters),
        ("optimizer state", memory.optimizer),
        ("key/value cache", memory.cache + memory.made),
        ("tokens", memory.inputs),
        ("gradients (float32)", memory.gradients),
        ("kept for the backward pass", memory.saved),
        (f"working memory in {memory.moment}", memory.working),
        ("total", memory.total),
        (f"a {result.request.topology.chip.name} has", result.request.topology.chip.memory),
    ]
    return Sheet(("memory of a device", "GB"), tuple((name, gigabytes(size)) for name, size in rows if size))


def time_sheet(result: Estimate) -> Sheet:
    """What a step spends its time on, each at full speed."""
    topology, seconds = result.request.topology, result.seconds
    rows = [
        ("compute", f"{quantity(result.flops.total / topology.devices)}FLOP", duration(seconds["compute"])),
        ("memory", f"{quantity(sum(result.memory_traffic.values()))}B", duration(seconds["memory"])),
    ]
    for axis, traffic in result.traffic.items():
        if traffic.inside:
            rows.append((f"links, {axis}", f"{quantity(traffic.inside)}B", duration(traffic.inside_seconds)))
        if traffic.across:
            rows.append((f"network, {axis}", f"{quantity(traffic.across)}B", duration(traffic.across_seconds)))
    if result.host_traffic:
        rows.append(("host", f"{quantity(result.host_traffic)}B", duration(seconds["host"])))
    rows.append(("all at once", "", duration(result.bound)))
    rows.append(("one after the other", "", duration(result.serial)))
    return Sheet(("a step of a device", "work", "at least"), tuple(rows))


def verdict(result: Estimate) -> list[str]:
    """The answers, a sentence each."""
    chip = result.request.topology.chip
    share = abs(result.headroom) / chip.memory
    if result.fits:
        fits = f"Fits: {gigabytes(result.headroom)} GB ({share:.0%}) of each {chip.name} are left."
        if share < MARGIN:
            fits += " That is within what the formula may be off: let --compile check it."
    else:
        fits = f"Does not fit: {gigabytes(-result.headroom)} GB ({share:.0%} of a {chip.name}) too many."
    unit = "tokens/s" if result.request.task != "decode" else "new tokens/s"
    speed = (
        f"At most {result.tokens_per_second:,.0f} {unit}, MFU {result.mfu:.1%}, bound by {result.limit}; "
        f"{result.tokens / result.serial:,.0f} if nothing overlaps. A bound, not a promise."
    )
    return [fits, speed]


def search_sheet(results: Sequence[Estimate]) -> Sheet:
    """Candidates in the order given."""
    rows = []
    for number, result in enumerate(results, start=1):
        request = result.request
        rows.append(
            (
                str(number),
                str(request.mesh),
                f"{request.batch:,}",
                *((request.remat,) if request.training else ()),
                f"{result.tokens_per_second:,.0f}",
                f"{result.tokens / result.serial:,.0f}",
                f"{result.mfu:.0%}",
                result.limit,
                gigabytes(result.memory.total),
                gigabytes(result.headroom),
            )
        )
    remat = ("remat",) if results and results[0].request.training else ()
    columns = ("", "mesh", "rows", *remat, "tokens/s at most", "no overlap", "MFU", "bound by", "GB", "left")
    return Sheet(columns, tuple(rows))


def summary_sheet(results: Sequence[Estimate]) -> Sheet:
    """A line for each plan."""
    rows = []
    for result in results:
        request = result.request
        rows.append(
            (
                request.model,
                str(request.topology),
                str(request.mesh),
                f"{request.batch:,} x {request.seq:,}",
                *((request.remat,) if request.training else ()),
                f"{gigabytes(result.memory.total)} of {gigabytes(request.topology.chip.memory)}",
                f"{result.tokens_per_second:,.0f}",
                f"{result.tokens / result.serial:,.0f}",
                f"{result.mfu:.0%}",
                result.limit,
            )
        )
    remat = ("remat",) if results and results[0].request.training else ()
    speed = ("tokens/s at most", "no overlap", "MFU", "bound by")
    return Sheet(("model", "chips", "mesh", "rows x tokens", *remat, "GB of a device", *speed), tuple(rows))


def beside_xla_sheet(result: Estimate, compiled: "Compiled") -> Sheet:
    """What the formula says and what XLA says, for one device."""
    devices = result.request.topology.devices
    memory = compiled.memory
    received: Counter[str] = Counter()
    for collective in compiled.collectives:
        received[", ".join(collective.axes)] += collective.bytes
    rows = [
        ("arguments", f"{gigabytes(result.memory.arguments)} GB", f"{gigabytes(memory.arguments)} GB"),
        ("at the worst moment", f"{gigabytes(result.memory.total)} GB", f"{gigabytes(memory.peak)} GB"),
        ("heap with its gaps", "", f"{gigabytes(memory.temporaries)} GB"),
        ("compute", f"{quantity(result.flops.total / devices)}FLOP", f"{quantity(compiled.flops)}FLOP"),
    ]
    for axes in dict.fromkeys([*(axis for axis, traffic in result.traffic.items() if sum(traffic)), *received]):
        traffic = result.traffic.get(axes)
        size = "" if traffic is None else f"{quantity(traffic.inside + traffic.across)}B"
        rows.append((f"received over {axes}", size, f"{quantity(received[axes])}B"))
    return Sheet(("of a device", "formula", f"XLA, {duration(compiled.seconds)} of compiling"), tuple(rows))


def collectives_sheet(compiled: "Compiled") -> Sheet:
    """Every collective of the program, those that move most first."""
    rows = [
        (
            collective.kind,
            ", ".join(collective.axes),
            collective.shape,
            f"{collective.count:,}",
            f"{quantity(collective.bytes)}B",
            ("yes, with its product" if collective.windowed else "yes") if collective.in_loop else "",
        )
        for collective in sorted(compiled.collectives, key=lambda collective: -collective.bytes)
    ]
    return Sheet(("collective", "over", "of", "times", "received", "in a loop"), tuple(rows))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}" if abs(size) >= 5e6 else f"{size / 1e9:.1g}"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} us"


def quantity(number: float) -> str:
    """With a prefix of the SI and a space before the unit, as in "12.3 T"."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:,.1f} {prefix}"
    return f"{number:,.0f} "
