"""Global batches: pure functions of their number, the same however many processes make them; made ahead by a thread."""

import gc
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sharding import make_mesh
from train.data.batches import Batches
from train.data.packing import packed_rows
from train.data.source import Source

SEQ = 16
MESHES = ["", "data=8", "data=2,fsdp=2,context=2", "fsdp=2,tensor=4", "expert=4,context=2"]


@pytest.fixture
def rows(store):
    return packed_rows([Source(store)], SEQ, 3)


def expected(rows, index, shape):
    """A batch, field by field, row by row."""
    count = int(np.prod(shape[:-1]))
    chosen = [rows[index * count + n] for n in range(count)]
    return [np.stack([row[field] for row in chosen]).reshape(shape) for field in range(4)]


class Counted:
    """Rows that remember which were asked for."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __getitem__(self, index):
        self.asked.append(index)
        return self.rows[index]


@pytest.mark.parametrize("shape", [(8, SEQ), (3, 8, SEQ)], ids=str)
@pytest.mark.parametrize("mesh", MESHES)
def test_batches_are_the_same_on_every_mesh(rows, mesh, shape):
    counted = Counted(rows)
    made = Batches(counted, shape[:-1], make_mesh(mesh) if mesh else None).at(5)
    arrays = made.tokens, made.targets, made.segment_ids, made.positions
    for array, field in zip(arrays, expected(rows, 5, shape), strict=True):
        assert array.dtype == np.int32 and array.shape == shape
        np.testing.assert_array_equal(array, field)
    assert len(counted.asked) == len(set(counted.asked))
    if mesh:
        sharding = made.tokens.sharding
        assert isinstance(sharding, NamedSharding) and len(sharding.device_set) == 8
        *accumulation, batch, length = sharding.spec
        assert accumulation == [None] * (len(shape) - 2)
        assert batch is not None and bool(length) == ("context" in mesh)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_their_own_rows_only(rows, processes, monkeypatch):
    """Each process makes the parts of its devices: played here by one, which sees all devices, in turns."""
    mesh = make_mesh("data=4,context=2")
    devices = list(mesh.devices.flat)
    made = [np.zeros((8, SEQ), np.int32) for _ in range(4)]
    asked = []
    for process in range(processes):
        mine = set(devices[process * 8 // processes : (process + 1) * 8 // processes])
        fields = iter(made)

        def fill(shape, sharding, part, mine=mine, fields=fields):
            whole = next(fields)
            for device, where in sharding.devices_indices_map(shape).items():
                if device in mine:
                    whole[where] = part(where)

        counted = Counted(rows)
        batches = Batches(counted, (8,), mesh)
        batches.at(0)  # what the rows are
        counted.asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "make_array_from_callback", fill)
            batches.at(2)
        asked += counted.asked
    for array, field in zip(made, expected(rows, 2, (8, SEQ)), strict=True):
        np.testing.assert_array_equal(array, field)
    assert sorted(asked) == list(range(16, 24)), "every row is read by one process, once"


def test_streams_go_on_where_they_are_told(rows):
    """grain#1178, datasets#7901: what came after a restore was not what would have come."""
    batches = Batches(rows, (2,))
    with batches.stream(7) as stream:
        for index in range(7, 20):
            number, batch = next(stream)
            assert number == index
            np.testing.assert_array_equal(batch.tokens, expected(rows, index, (2, SEQ))[0])
    with Batches(rows, (2,)).stream(7) as again:
        np.testing.assert_array_equal(next(again)[1].tokens, expected(rows, 7, (2, SEQ))[0])


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_only_so_many_are_made_ahead(rows):
    counted = Counted(rows)
    with Batches(counted, (1,), depth=3).stream() as stream:
        wait_until(lambda: len(counted.asked) == 4)  # three wait, one more is held by the thread
        time.sleep(0.1)
        assert len(counted.asked) == 4
        next(stream)
        wait_until(lambda: len(counted.asked) == 5)
    assert not threads()


class Slow:
    def __init__(self, rows, gate):
        self.rows, self.gate = rows, gate

    def __getitem__(self, index):
        if index >= 2:
            self.gate.wait()
        return self.rows[index]


def test_waiting_is_measured(rows):
    gate = threading.Event()
    batches = Batches(Slow(rows, gate), (1,))
    with batches.stream() as stream:
        next(stream), next(stream)
        before = batches.waited
        threading.Timer(0.2, gate.set).start()
        next(stream)
        assert 0.15 < batches.waited - before < 10


def test_waiting_while_the_devices_are_at_work_does_not_count(rows):
    """They do not wait then: what is slow is the step."""
    gate, asked = threading.Event(), []

    def idle():
        asked.append(len(asked))
        gate.wait()
        wait_until(lambda: stream._made.qsize())

    batches = Batches(Slow(rows, gate), (1,))
    with batches.stream(idle=idle) as stream:
        wait_until(lambda: stream._made.qsize() == 2)
        next(stream), next(stream)
        before = len(asked), batches.waited
        threading.Timer(0.3, gate.set).start()
        next(stream)
    assert before == (0, 0)  # what is there is not waited for
    assert asked == [0] and batches.waited < 0.15


class Failing:
    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, index):
        if index == 3:
            raise OSError(5, "Input/output error", "tokens-000000.bin")
        return self.rows[index]


def test_errors_are_raised_where_the_batch_is_missing(rows):
    with Batches(Failing(rows), (1,)).stream() as stream:
        assert [next(stream)[0] for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(OSError, match="tokens-000000.bin"):
                next(stream)
    assert not threads()


def test_closing_ends_the_thread(rows):
    stream = Batches(rows, (1,)).stream()
    next(stream)
    stream.close()
    stream.close()
    assert not threads()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_forgetting_a_stream_ends_the_thread(rows):
    stream = Batches(rows, (1,)).stream()
    next(stream)
    del stream
    gc.collect()
    wait_until(lambda: not threads())
