"""Tokenizing ahead: files to a token store, in parallel processes, going on where an earlier run stopped."""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.files import FULL, cores, expanded, shown, sync, sync_tree, write_whole
from qwen2_jax.tokenizer import Tokenizer
from train.data.encode import (
    PARTS,
    Encoder,
    Encoding,
    TooManyBad,
    end_id,
    lengths_file,
    receipt_file,
    tokenizer_digest,
)
from train.data.files import DataFile, check_apart, find_files
from train.data.readers import MAX_BAD_RECORDS, Bad, Part, plan
from train.data.store import (
    FORMAT,
    MANIFEST,
    OFFSETS,
    VERSION,
    content_digest,
    read_manifest,
    token_dtype,
    tokens_file,
)
from train.data.worker import Worker
from train.data.workplace import clear, complete, locked

PART_SIZE = 32 << 20
"""Bytes of the sources in a part, about: what is done again after a crash, and the size of a file of tokens."""

_NAMED = 1000  # bad records that the manifest describes


class Tokenized(NamedTuple):
    """What was done."""

    destination: str
    documents: int
    tokens: int
    bad_records: int
    empty_records: int
    first_bad: list[str]
    """A few of them, as sentences."""
    left_out: dict[str, int]
    """Files of folders whose names do not tell their kind, counted by how the names end."""
    parts: int
    resumed_parts: int
    """How many an earlier run had finished."""
    already_complete: bool
    seconds: float


def tokenize(
    sources: Sequence[str],
    destination: Path,
    how: Encoding,
    *,
    kind: str | None = None,
    max_bad_records: int = MAX_BAD_RECORDS,
    workers: int | None = None,
    part_size: int = PART_SIZE,
    wait: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokenized:
    """Makes a token store of files. The result does not depend on how many processes make it, nor on interruptions.

    Args:
      sources: as of `find_files`.
      destination: of the folder, which appears when it is complete; the work happens in `destination`.partial.
      kind: of all files, whatever their names; one of `train.data.files.KINDS`.
      max_bad_records: more stop the work.
      workers: processes; by default one for each processor, and 0 for none but this one.
      part_size: bytes of the sources that are done again, at most, after a crash.
      wait: for another process that makes the same store, instead of an error.
      progress: is told bytes done and bytes in all, of the sources.

    Raises:
      ValueError: for sources, a tokenizer or a destination that cannot be used, too many bad records, and unfinished
        work in the way that was for something else. Nothing that was there is overwritten or deleted.
      OSError: if a file cannot be read or written.
    """
    begin = time.monotonic()
    destination = expanded(destination).absolute()
    check_apart(destination, sources)
    others: collections.Counter[str] = collections.Counter()
    files = find_files(sources, kind, lambda path: others.update([path.suffix]))
    task = task_of(files, how, part_size)
    parts = plan(files, how.field, part_size)
    with locked(destination, task, wait) as work:
        if work is None:
            return _report(destination, begin, others, len(parts), already=True)
        todo = [number for number in range(len(parts)) if not _finished(work, number, task["dtype"])]
        resumed = len(parts) - len(todo)
        try:
            _write(work, parts, todo, how, max_bad_records, cores() if workers is None else workers, progress)
            _check_unchanged(files)
            _publish(work, destination, len(parts), task)
        except OSError as error:
            if error.errno in FULL:
                why = f"the disk of {shown(work)} is full ({error.strerror}); what is finished is kept there"
                raise OSError(f"{why}: free some space and run the same command again") from None
            raise
    return _report(destination, begin, others, len(parts), resumed=resumed)


def task_of(files: Sequence[DataFile], how: Encoding, part_size: int = PART_SIZE) -> dict[str, Any]:
    """What the result depends on, as JSON. Raises ValueError and OSError for a tokenizer that cannot be used."""
    folder = expanded(how.tokenizer)
    if not folder.is_dir():
        raise ValueError(f"{shown(how.tokenizer)} is no folder with a tokenizer; name one, such as a model's")
    tokenizer = Tokenizer.from_folder(folder)
    backend = json.loads(tokenizer.backend.to_str())
    splitting = json.dumps([backend["normalizer"], backend["pre_tokenizer"]], sort_keys=True)
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "splitting": hashlib.sha256(splitting.encode()).hexdigest(),
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "end": end_id(tokenizer, how.end),
        "field": how.field,
        "control_tokens": how.control_tokens,
        "part_size": part_size,
        "sources": {
            file.path: {"kind": file.kind, "size": file.size, "time of modification": file.modified} for file in files
        },
    }


def _finished(work: Path, number: int, dtype: str) -> bool:
    """Whether an earlier run wrote a part whole: its receipt came last. Training compares the tokens' own digest."""
    try:
        receipt = _receipt(work, number)
        lengths = lengths_file(work, number).read_bytes()
        sentences = [str(record) for record in _named([receipt])]
        return (
            all(type(receipt[name]) is int for name in ("records", "bad", "empty", "documents", "tokens"))
            and isinstance(receipt["sha256"], str)
            and len(sentences) <= receipt["bad"]
            and hashlib.sha256(lengths).hexdigest() == receipt["lengths_sha256"]
            and (work / tokens_file(number)).stat().st_size == receipt["tokens"] * np.dtype(dtype).itemsize
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _write(
    work: Path,
    parts: Sequence[Part],
    todo: Sequence[int],
    how: Encoding,
    max_bad: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the parts of `todo`. Raises ValueError once more than `max_bad` records of all parts are bad."""
    total = sum(part.size for part in parts)
    done = total - sum(parts[number].size for number in todo)
    earlier = [_receipt(work, number) for number in sorted(set(range(len(parts))) - set(todo))]
    count, named = sum(receipt["bad"] for receipt in earlier), _named(earlier)
    if count > max_bad:
        raise _too_many(work, named, count, max_bad)
    progress(done, total)
    with _writers(work, how, min(workers, len(todo))) as write:
        try:
            for number, receipt in write([(number, parts[number], max_bad) for number in todo]):
                done += parts[number].size
                count += receipt["bad"]
                named += _named([receipt])
                if count > max_bad:
                    raise TooManyBad([], 0)
                progress(done, total)
        except TooManyBad as error:
            raise _too_many(work, named + error.args[0], count + error.args[1], max_bad) from None


@contextlib.contextmanager
def _writers(work: Path, how: Encoding, workers: int) -> Iterator[Callable[..., Iterator[tuple[int, dict[str, Any]]]]]:
    """Gives a function that writes parts and yields the number and the receipt of each, as they are finished."""
    if workers <= 0:
        encoder = Encoder(work, how)
        yield lambda tasks: ((task[0], encoder.write(*task)) for task in tasks)
        return
    processes = [Worker(work, how) for _ in range(workers)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def run(task: tuple[int, Part, int]) -> tuple[int, dict[str, Any]]:
        process = idle.get()
        try:
            return task[0], process.write(*task)
        finally:
            idle.put(process)

    threads = concurrent.futures.ThreadPoolExecutor(workers)

    def write(tasks: Sequence[tuple[int, Part, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for future in concurrent.futures.as_completed([threads.submit(run, task) for task in tasks]):
            yield future.result()

    try:
        yield write
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.stop()
        threads.shutdown()


def _receipt(work: Path, number: int) -> dict[str, Any]:
    return json.loads(receipt_file(work, number).read_bytes())


def _named(receipts: Iterable[dict[str, Any]]) -> list[Bad]:
    return [Bad(*record) for receipt in receipts for record in receipt["named"]]


def _too_many(work: Path, named: Sequence[Bad], count: int, max_bad: int) -> ValueError:
    few = "; ".join(map(str, named[:3]))
    return ValueError(
        f"{count} bad records, more than the {max_bad} that --max-bad-records allows: {few}. Allow more, and what is "
        f"finished is kept; or mend them, and remove {shown(work)} if it is there"
    )


def _check_unchanged(files: Sequence[DataFile]) -> None:
    for file in files:
        status = os.stat(file.path)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
            raise ValueError(f"{shown(file.path)} changed while it was read; run again once nobody writes to it")


def _publish(work: Path, destination: Path, count: int, task: dict[str, Any]) -> None:
    """Brings the parts together, and makes the work folder the destination."""
    receipts = [_receipt(work, number) for number in range(count)]
    kept = [number for number, receipt in enumerate(receipts) if receipt["documents"]]
    bad = _named(receipts)
    totals = {key: sum(receipt[key] for receipt in receipts) for key in ("documents", "tokens", "records", "empty")}
    if not kept:
        shutil.rmtree(work / PARTS)  # nothing to go on with
        first = f"; the first bad one: {bad[0]}" if bad else ""
        raise ValueError(f"there are no documents in {totals['records']} records of the sources{first}")
    offsets = hashlib.sha256()
    with (work / OFFSETS).open("wb") as file:
        last = np.zeros(1, "<u8")
        for numbers in (last, *(_lengths(work, number) for number in kept)):
            ends = last[-1] + np.cumsum(numbers, dtype="<u8")
            offsets.update(ends.data)
            file.write(ends.data)
            last = ends
    files = [
        {"name": tokens_file(number), **{key: receipts[number][key] for key in ("documents", "tokens", "sha256")}}
        for number in kept
    ]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": task["dtype"],
        "tokenizer": task["tokenizer"],
        "digest": content_digest(task["dtype"], offsets.hexdigest(), [file["sha256"] for file in files]),
        **totals,
        "bad": sum(receipt["bad"] for receipt in receipts),
        "bad_records": [str(record) for record in bad[:_NAMED]],
        "offsets_sha256": offsets.hexdigest(),
        "files": files,
        "task": task,
    }
    write_whole(work / MANIFEST, json.dumps(manifest, indent=1).encode(), work / PARTS)
    for number in set(range(count)) - set(kept):
        (work / tokens_file(number)).unlink(missing_ok=True)
    sync_tree(work)
    complete(destination, task)  # raises if something has appeared there meanwhile
    os.rename(work, destination)  # replaces nothing but an empty folder
    sync(destination.parent)
    clear(destination)


def _lengths(work: Path, number: int) -> np.ndarray:
    return np.fromfile(lengths_file(work, number), "<u8")


def _report(
    destination: Path, begin: float, left_out: Mapping[str, int], parts: int, resumed: int = 0, already: bool = False
) -> Tokenized:
    manifest = read_manifest(destination)
    return Tokenized(
        str(destination),
        manifest["documents"],
        manifest["tokens"],
        manifest["bad"],
        manifest["empty"],
        manifest["bad_records"][:3],
        dict(left_out),
        parts,
        resumed,
        already,
        time.monotonic() - begin,
    )
