"""Copies arrays from a checkpoint to a folder in chunks: in bounded memory, on every core, resuming after a crash."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, Protocol

import numpy as np

from convert.chunks import Chunk, Source
from convert.dtypes import cast, count_nonfinite
from convert.files import cores
from convert.names import Piece
from convert.workspace import Workspace

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those there are in all."""

_BASE = 220_000_000  # the interpreter with its libraries, measured, and some slack for the allocator
_MOST_WORKERS = 8  # more readers do not make a disk faster


class Sink(Protocol):
    """Where arrays go: chunks in any order, from any number of threads."""

    dtypes: dict[str, np.dtype]

    def write(self, path: str, chunk: Chunk, numbers: np.ndarray) -> None: ...
    def read(self, path: str, chunk: Chunk) -> np.ndarray: ...
    def digest(self, path: str, chunk: Chunk, numbers: np.ndarray) -> str: ...


class Part(NamedTuple):
    """One chunk of one array, the unit of work and of resumption."""

    path: str
    chunk: Chunk

    @property
    def key(self) -> str:
        return f"{self.path}[{self.chunk.start}:{self.chunk.stop}]"


@dataclasses.dataclass
class Tally:
    """What a copy did."""

    bytes_total: int = 0
    bytes_resumed: int = 0
    """Of these, found finished and intact from an earlier run."""
    seconds: float = 0.0
    digests: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By array, of its chunks in order."""
    nonfinite: Counter[str] = dataclasses.field(default_factory=Counter)
    """NaN and infinite numbers in the source, by tensor."""
    overflowed: Counter[str] = dataclasses.field(default_factory=Counter)
    """Finite numbers that the cast made infinite, by tensor."""


def copy_arrays(
    source: Source,
    sink: Sink,
    parts: Sequence[Part],
    workspace: Workspace,
    max_memory: int,
    progress: Progress | None = None,
    resident: int = 0,
) -> Tally:
    """Copies `parts` of all arrays, cast to the sink's dtypes. Parts with a receipt are checked, and redone if damaged.

    Args:
      source: where the numbers are.
      sink: where they go.
      parts: the chunks of every array, in order.
      workspace: keeps a receipt per finished part.
      max_memory: bytes that a process doing nothing else may take up, libraries included.
      progress: told after every part.
      resident: bytes that the source takes up besides what is read from it.

    Raises:
      ValueError: if the source is damaged, or max_memory is too small for a single worker.
      OSError: if something cannot be read or written.
    """
    sizes = [(part.chunk.stop - part.chunk.start) * sink.dtypes[part.path].itemsize for part in parts]
    tally, begin = Tally(bytes_total=sum(sizes)), time.monotonic()
    receipts: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(_workers(source, sink, parts, max_memory, resident)) as pool:
        futures = {
            pool.submit(_finish, source, sink, part, workspace.receipts.get(part.key)): i
            for i, part in enumerate(parts)
        }
        done = 0
        try:
            for future in as_completed(futures):
                part, size = parts[futures[future]], sizes[futures[future]]
                receipt = receipts[part.key] = future.result()
                if receipt is workspace.receipts.get(part.key):
                    tally.bytes_resumed += size
                else:
                    workspace.note(part.key, receipt)
                done += size
                if progress:
                    progress(done, tally.bytes_total)
        finally:
            pool.shutdown(cancel_futures=True)
    for part in parts:
        receipt = receipts[part.key]
        tally.digests.setdefault(part.path, []).append(receipt["sha256"])
        tally.nonfinite.update(receipt.get("nonfinite", {}))
        tally.overflowed.update(receipt.get("overflowed", {}))
    tally.seconds = time.monotonic() - begin
    return tally


def _finish(source: Source, sink: Sink, part: Part, receipt: dict[str, Any] | None) -> dict[str, Any]:
    """Makes sure that one part is where it belongs; returns its receipt, the given one if that still holds."""
    path, chunk = part
    if receipt is not None and _still_holds(sink, part, receipt):
        return receipt
    numbers = np.empty(chunk.stop - chunk.start, source.dtypes[path])
    source.read(path, chunk.start, numbers)
    result = cast(numbers, sink.dtypes[path])
    sink.write(path, chunk, result)
    receipt = {"sha256": sink.digest(path, chunk, result)}
    if after := count_nonfinite(result):
        before = after if result is numbers else count_nonfinite(numbers)
        pieces = list(source.arrays[path].overlaps(chunk.start, chunk.stop))
        if before:
            receipt["nonfinite"] = _by_tensor(pieces, numbers)
        if after > before:
            receipt["overflowed"] = dict(Counter(_by_tensor(pieces, result)) - Counter(_by_tensor(pieces, numbers)))
    return receipt


def _by_tensor(pieces: Sequence[Piece], numbers: np.ndarray) -> dict[str, int]:
    counts = {piece.name: count_nonfinite(numbers[piece.start : piece.start + piece.size]) for piece in pieces}
    return {name: count for name, count in counts.items() if count}


def _still_holds(sink: Sink, part: Part, receipt: dict[str, Any]) -> bool:
    try:
        return sink.digest(part.path, part.chunk, sink.read(part.path, part.chunk)) == receipt["sha256"]
    except (OSError, ValueError):  # missing or cut short
        return False


def _workers(source: Source, sink: Sink, parts: Sequence[Part], max_memory: int, resident: int) -> int:
    """How many parts fit into memory at once, and no more than there are cores."""

    def memory(part: Part) -> int:
        read, written = source.dtypes[part.path], sink.dtypes[part.path]
        return (part.chunk.stop - part.chunk.start) * (read.itemsize + (written.itemsize if read != written else 0))

    each, base = max(map(memory, parts)) + (4 << 20), _BASE + resident
    if max_memory < base + each:
        needed = -(-(base + each) // 1_000_000)
        raise ValueError(
            f"--max-host-memory {max_memory // 1_000_000}MB is too little for this conversion; it takes {needed}MB"
        )
    return min((max_memory - base) // each, cores(), _MOST_WORKERS)
