"""Rows to batches on devices, made ahead by a thread: the same global batch on any number of processes. What a row
holds is the objective's business."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sharding.rules import batch_sharding


class Rows(Protocol):
    """Training data without an end."""

    def __getitem__(self, index: int) -> Any:
        """Row `index`, from 0 on: the same whenever, wherever and in whatever order it is asked for. A pytree of NumPy
        arrays, as the objective wants a batch of them; of the same structure, shapes and dtypes in every row."""
        ...

    @property
    def digest(self) -> str:
        """Of what the rows are made from, and of how: equal for equal data, wherever it lies."""
        ...

    def described(self, count: int) -> str:
        """What they are made from, and how often the first `count` rows go through it, for people."""
        ...


class Batches:
    """Batch i holds the rows i * A * B up to (i + 1) * A * B: a pytree as of a row, each array with all rows' in front.

    Attributes:
      waited: seconds that `stream`s have kept idle devices waiting, in all.
    """

    def __init__(self, rows: Rows, shape: Sequence[int], mesh: Mesh | None = None, depth: int = 2):
        """
        Args:
          rows: the data.
          shape: how many rows a batch has: (B,), or (A, B) with A micro-batches.
          mesh: whose devices a batch is split over, B and each array's last dim as `sharding.batch_sharding` says; by
            default one device has all.
          depth: batches that are made ahead.
        """
        assert depth >= 1
        self._rows, self._shape, self._mesh, self._depth = rows, tuple(shape), mesh, depth
        self._form: Any = None  # of a row, known from the first one that is read
        self.waited = 0.0

    @property
    def digest(self) -> str:
        """As of `Rows`."""
        return self._rows.digest

    def described(self, count: int) -> str:
        """As of `Rows`, of so many batches."""
        return self._rows.described(count * int(np.prod(self._shape)))

    def at(self, index: int) -> Any:
        """Batch `index`, of global arrays. Each process reads only the rows of its own devices, and once another."""
        read: dict[int, tuple[list[np.ndarray], Any]] = {}
        count = int(np.prod(self._shape))
        numbers = index * count + np.arange(count).reshape(self._shape)

        def row(number: int) -> tuple[list[np.ndarray], Any]:
            if number not in read:
                read[number] = jax.tree.flatten(self._rows[number])
            return read[number]

        if self._form is None:
            leaves, structure = row(int(numbers.flat[0]))
            self._form = [np.shape(leaf) for leaf in leaves], structure
        shapes, structure = self._form

        def array(leaf: int, of_row: tuple[int, ...]) -> jax.Array:
            def part(where: tuple[slice, ...] | None) -> np.ndarray:
                assert where is not None
                chosen, within = numbers[where[: len(self._shape)]], where[len(self._shape) :]
                parts = np.stack([row(int(number))[0][leaf][within] for number in chosen.flat])
                return parts.reshape(*chosen.shape, *parts.shape[1:])

            return jax.make_array_from_callback((*self._shape, *of_row), self._sharding(of_row), part)

        return jax.tree.unflatten(structure, [array(leaf, of_row) for leaf, of_row in enumerate(shapes)])

    def stream(self, first: int = 0, idle: Callable[[], object] = lambda: None) -> "Stream":
        """Batches from number `first` on, without an end, made ahead from this call on.

        Args:
          idle: returns once the devices have nothing left to do; called where a batch is not there yet, so that waiting
            while they are at work does not count as `waited`.
        """
        return Stream(self, first, self._depth, idle)

    def _sharding(self, of_row: tuple[int, ...]) -> Any:
        """Of an array of a batch, by its shape in a row."""
        if self._mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        *parts, rows = self._shape
        batch, last = batch_sharding(self._mesh, (rows, of_row[-1] if of_row else 1)).spec
        within = (*(None,) * (len(of_row) - 1), last) if of_row else ()
        return NamedSharding(self._mesh, PartitionSpec(*(None for _ in parts), batch, *within))


class Stream(Iterator[tuple[int, Any]]):
    """Pairs of number and batch. A context manager: leaving it ends the thread that makes them ahead.

    What goes wrong in the thread is raised where the batch was to be had.
    """

    def __init__(self, batches: Batches, first: int, depth: int, idle: Callable[[], object]):
        self._batches, self._idle = batches, idle
        self._made: queue.Queue[tuple[int, Any] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # The thread knows nothing of this object, so that one that is forgotten ends it.
        self._thread = threading.Thread(
            target=_make, args=(batches, first, self._made, self._stop), name="batches", daemon=True
        )
        self._thread.start()

    def __next__(self) -> tuple[int, Any]:
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
        item: tuple[int, Any] | BaseException
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
