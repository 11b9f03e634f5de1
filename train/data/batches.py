"""Rows to batches on devices, made ahead by a thread: the same global batch on any number of processes."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sharding.rules import batch_sharding
from train.data.packing import Row, Rows
from train.pretraining import Batch


class Batches:
    """Batch i holds the rows i * A * B up to (i + 1) * A * B.

    Attributes:
      waited: seconds that `stream`s have kept idle devices waiting, in all.
    """

    def __init__(self, rows: Rows, shape: Sequence[int], mesh: Mesh | None = None, depth: int = 2):
        """
        Args:
          rows: each of T tokens.
          shape: of each array of a batch: (B, T), or (A, B, T) with A micro-batches, or (None, B, T), which is (B, T).
          mesh: whose devices a batch is split over, as `sharding.batch_sharding` says; by default one device has all.
          depth: batches that are made ahead.
        """
        assert depth >= 1
        self._rows, self._depth = rows, depth
        self.shape = tuple(size for size in shape if size is not None)
        """Of each array of a batch."""
        self._sharding: Any = SingleDeviceSharding(jax.local_devices()[0])
        if mesh is not None:
            spec = batch_sharding(mesh, self.shape[-2:]).spec
            self._sharding = NamedSharding(mesh, PartitionSpec(*(None,) * (len(self.shape) - 2), *spec))
        self.waited = 0.0

    @property
    def digest(self) -> str:
        """Of the text, as of `Rows`."""
        return self._rows.digest

    def at(self, index: int) -> Batch:
        """Batch `index`, as global arrays, int32. Each process reads only the rows of its own devices."""
        rows: dict[int, Row] = {}
        first = index * int(np.prod(self.shape[:-1]))
        numbers = first + np.arange(int(np.prod(self.shape[:-1]))).reshape(self.shape[:-1])

        def array(field: int) -> jax.Array:
            def part(where: tuple[slice, ...] | None) -> np.ndarray:
                assert where is not None
                chosen = numbers[where[:-1]]
                parts = [self._row(rows, int(number))[field][where[-1]] for number in chosen.flat]
                return np.stack(parts).reshape(*chosen.shape, -1)

            return jax.make_array_from_callback(self.shape, self._sharding, part)

        tokens, targets, segment_ids, positions = map(array, range(4))
        return Batch(tokens=tokens, targets=targets, segment_ids=segment_ids, positions=positions)

    def stream(self, first: int = 0, idle: Callable[[], object] = lambda: None) -> "Stream":
        """Batches from number `first` on, without an end, made ahead from this call on.

        Args:
          idle: returns once the devices have nothing left to do; called where a batch is not there yet, so that waiting
            while they are at work does not count as `waited`.
        """
        return Stream(self, first, self._depth, idle)

    def _row(self, rows: dict[int, Row], number: int) -> Row:
        if number not in rows:
            rows[number] = self._rows[number]
            assert rows[number].tokens.shape == self.shape[-1:]
        return rows[number]


class Stream(Iterator[tuple[int, Batch]]):
    """Pairs of number and batch. A context manager: leaving it ends the thread that makes them ahead.

    What goes wrong in the thread is raised where the batch was to be had.
    """

    def __init__(self, batches: Batches, first: int, depth: int, idle: Callable[[], object]):
        self._batches, self._idle = batches, idle
        self._made: queue.Queue[tuple[int, Batch] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # The thread knows nothing of this object, so that one that is forgotten ends it.
        self._thread = threading.Thread(
            target=_make, args=(batches, first, self._made, self._stop), name="batches", daemon=True
        )
        self._thread.start()

    def __next__(self) -> tuple[int, Batch]:
        """
        Raises:
          ValueError: if the stream is closed; also whatever making the batch raised, now and ever after, and what
            `idle` raises.
        """
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise ValueError("the stream of batches is closed")
        try:
            made = self._made.get_nowait()
        except queue.Empty:
            self._idle()
            begin = time.perf_counter()
            made = self._made.get()
            self._batches.waited += time.perf_counter() - begin
        if isinstance(made, BaseException):
            self._error = made
            raise made
        return made

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """Returns when the thread has ended; batches made ahead are forgotten."""
        self._stop.set()
        self._thread.join()
        while not self._made.empty():
            self._made.get_nowait()


def _make(batches: Batches, first: int, made: queue.Queue[Any], stop: threading.Event) -> None:
    index = first
    while not stop.is_set():
        item: tuple[int, Batch] | BaseException
        try:
            item = index, batches.at(index)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                made.put(item, timeout=0.05)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        index += 1
