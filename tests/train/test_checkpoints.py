"""Checkpoints: whole or not there, bit by bit what was saved, and no damage goes unnoticed."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sharding import make_mesh
from tests.processes import free_address
from tests.sharding.models import DENSE
from train import checkpoints as module
from train.checkpoints import Checkpoints, kept
from train.optimizer import adamw
from train.step import TrainState, abstract_state, state_shardings

# Orbax's threads end in the error that they also hand on.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIMIZER = adamw(1e-2)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (folder / "unknown.py").write_text("print()")
    return folder


@pytest.fixture
def open_run(model, tmp_path):
    """open_run(**options) -> a new `Checkpoints` of the same run."""
    opened = []

    def new(**options):
        opened.append(Checkpoints(tmp_path / "run/checkpoints", model, **options))
        return opened[-1]

    yield new
    for run in opened:
        run.close()


def small_state(seed: int = 0):
    """A training state in little, with one array of each kind."""
    draw = np.random.default_rng(seed)
    weights = draw.standard_normal((4, 6)).astype(np.float32)
    return {
        "step": jnp.asarray(np.int32(seed)),
        "params": {"layers": {"w": jnp.asarray(weights)}, "norm": jnp.asarray(weights[0])},
        "optimizer": (jnp.asarray(weights.astype(ml_dtypes.bfloat16)), jnp.asarray(weights > 0)),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(actual, expected):
    def compare(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(compare, actual, expected)


def saved(run, step, seed=None, **extra):
    state = small_state(step if seed is None else seed)
    run.save(step, state, extra)
    run.wait()
    return state


@contextmanager
def no_room(size=100):
    """The system refuses to make any file larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Round trips.


def test_a_training_state_comes_back_on_any_mesh(open_run):
    """Parameters, moments, counts and all: a resume that loses the optimizer looks plausible, but is another run
    (Automodel#763 of NVIDIA-NeMo, KempnerForge#115)."""
    mesh = make_mesh("fsdp=4,tensor=2")
    draw = np.random.default_rng(0)

    def filled(leaf, sharding):
        bits = draw.bytes(max(1, leaf.size) * leaf.dtype.itemsize)  # NaNs of every kind included
        values = np.frombuffer(bits, np.uint8 if leaf.dtype == bool else leaf.dtype).reshape(leaf.shape)
        return jax.device_put((values % 2).astype(bool) if leaf.dtype == bool else values, sharding)

    state = jax.tree.map(filled, abstract_state(DENSE, OPTIMIZER), state_shardings(DENSE, OPTIMIZER, mesh))
    extra = {"phase": 1, "batches": 1234, "passed_over": [[0, 3, 5]], "seed": 7, "note": "ü"}
    run = open_run()
    run.save(1234, state, extra)
    run.wait()
    run.verify(1234)
    for other in ("data=8", "fsdp=4,tensor=2", None):
        wanted = abstract_state(DENSE, OPTIMIZER, other and make_mesh(other))
        back, told = open_run().restore(1234, wanted)
        assert isinstance(back, TrainState)
        assert told == extra
        assert_same(back, state)
        shardings = jax.tree.map(lambda x: x.sharding, back)
        assert other is None or shardings == jax.tree.map(lambda x: x.sharding, wanted)


def test_the_state_may_be_used_up_once_save_returns(open_run):
    before = {"x": np.arange(1 << 20, dtype=np.float32)}
    use_up = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    run = open_run()
    for step in range(3):
        state = jax.tree.map(jnp.array, before)
        run.save(step, state)
        jax.block_until_ready(use_up(state))
    run.wait()
    for step in range(3):
        assert_same(run.restore(step, abstract(state))[0], before)


def test_a_step_folder_is_complete_in_itself(open_run, model):
    saved(open_run(), 3)
    folder = model.parent / "run/checkpoints/00000003"
    for name in ("config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert not (folder / "unknown.py").exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arrays"].keys() == {"step", "params.layers.w", "params.norm", "optimizer.0", "optimizer.1"}
    entry = manifest["arrays"]["optimizer.0"]
    assert (entry["dtype"], entry["shape"], len(entry["digest"])) == ("bfloat16", [4, 6], 16)


def test_the_files_of_the_model_are_those_of_the_start(open_run, model):
    run = open_run()
    (model / "tokenizer.json").unlink()
    saved(run, 1)
    assert (model.parent / "run/checkpoints/00000001/tokenizer.json").exists()


# Damage.


@pytest.fixture
def damageable(open_run, model):
    """A run with steps 1 and 2, the folder of step 2, and what is in there."""
    run = open_run()
    saved(run, 1)
    state = saved(run, 2)
    return run, model.parent / "run/checkpoints/00000002", state


def _array_of(file, folder):
    parts = file.relative_to(folder).parts
    return parts[2] if len(parts) > 3 and parts[1] == "state" else None


def test_every_flipped_bit_is_noticed_and_named(damageable):
    """In each file of every array all kinds of places, and in every other file some, those of the manifest included."""
    run, folder, state = damageable
    draw = np.random.default_rng(0)
    arrays = set()
    for file in files_of(folder):
        content = file.read_bytes()
        if not content:
            continue
        numbers = "c" in file.relative_to(folder).parts
        places = {0, len(content) - 1, *draw.integers(len(content), size=4 if numbers else 2).tolist()}
        for place in sorted(places):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(draw.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"resume from the step before: --resume 1$") as caught:
                run.restore(2, abstract(state))
            message = str(caught.value)
            assert "\n" not in message and message.startswith("step 2: ")
            if name := _array_of(file, folder):
                arrays.add(name)
                assert f"array {name} is damaged" in message
                assert str(file if file.name == "zarr.json" else folder / "state-0/state" / name) in message
            else:
                assert file.name in message
            with pytest.raises(ValueError):
                run.verify(2)
        file.write_bytes(content)
    assert len(arrays) == len(jax.tree.leaves(state))
    assert_same(run.restore(2, abstract(state))[0], state)


@pytest.mark.parametrize("how", ["truncated", "longer", "empty", "missing", "swapped"])
def test_every_broken_file_is_named(how, damageable):
    run, folder, state = damageable
    for file in files_of(folder):
        name = _array_of(file, folder)
        content = file.read_bytes()
        if name is None or (how == "swapped" and file.name == "zarr.json"):
            continue
        if how == "swapped":
            other = folder.parent / "00000001" / file.relative_to(folder)
            file.write_bytes(other.read_bytes())  # what was saved a step before: sound in itself
        elif how == "missing":
            file.unlink()
        else:
            file.write_bytes({"truncated": content[:-1], "longer": content + b"\0", "empty": b""}[how])
        for look in (lambda: run.restore(2, abstract(state)), lambda: run.verify(2)):
            with pytest.raises(ValueError, match="--resume 1$") as caught:
                look()
            assert f"array {name} is damaged" in str(caught.value) and str(folder) in str(caught.value)
        file.write_bytes(content)
    run.verify(2)


def test_a_missing_file_of_the_model_is_named(damageable):
    run, folder, state = damageable
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json cannot be read: No such file"):
        run.restore(2, abstract(state))


def test_several_damaged_arrays_are_all_named(damageable):
    run, folder, state = damageable
    for name in ("params.norm", "optimizer.0"):
        (file,) = files_of(folder / "state-0/state" / name / "c")
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"2 arrays are damaged \(optimizer.0, params.norm\)"):
        run.restore(2, abstract(state))


def test_the_first_step_has_none_before_it(damageable):
    run, folder, state = damageable
    (folder.parent / "00000001/config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is damaged.*; there is no step before it$"):
        run.restore(1, abstract(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "more": s["step"]}, "1 arrays missing in it (more)"),
        (lambda s: {**s, "params": {"norm": s["params"]["norm"]}}, "1 arrays too many (params.layers.w)"),
        (
            lambda s: {**s, "step": jax.ShapeDtypeStruct((2,), jnp.int32)},
            "1 of another shape (step: (), expected (2,))",
        ),
        (
            lambda s: {**s, "step": jax.ShapeDtypeStruct((), jnp.float32)},
            "1 of another dtype (step: int32, expected float32)",
        ),
        (
            lambda s: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), s),
            "4 of another dtype (optimizer.1: bool, expected bfloat16; ",
        ),
    ],
)
def test_nothing_is_cast_padded_or_left_out(change, message, damageable):
    run, _, state = damageable
    with pytest.raises(ValueError) as caught:
        run.restore(2, change(abstract(state)))
    assert message.replace("; ", ", ") in str(caught.value).replace("; ", ", ")
    assert str(caught.value).endswith("resume with the options that it was saved with")


def test_steps_that_are_not_there(damageable):
    run, _, state = damageable
    with pytest.raises(ValueError, match="has no step 7: there are 1, 2$"):
        run.restore(7, abstract(state))


def test_a_manifest_of_another_version(damageable, monkeypatch):
    run, _, state = damageable
    monkeypatch.setattr("convert.step_folder.VERSION", 2)
    with pytest.raises(ValueError, match="is of 'qwen2_jax training step' 1, this program reads .* 2"):
        run.restore(2, abstract(state))


# Saves that fail.


@pytest.mark.parametrize("told_by", ["save", "check", "wait", "close"])
def test_a_save_that_fails_in_the_background_is_told_by_the_next_call(told_by, open_run):
    """orbax#605: the run went on, and crashed at the next save. keras#23609: close() swallowed the error, and the last
    checkpoint was missing."""
    run = open_run()
    saved(run, 1)
    with no_room():
        run.save(2, small_state(2))
        while run._pending is not None and not run._pending.done():
            time.sleep(0.01)
    calls = {"save": lambda: run.save(3, small_state(3)), "check": run.check, "wait": run.wait, "close": run.close}
    with pytest.raises(
        OSError, match="step 2 could not be saved in .*File too large.*earlier steps are untouched: free"
    ):
        calls[told_by]()
    assert run.steps() == [1]
    run.close()  # what was told once is not told again


@pytest.fixture
def slow_commit(monkeypatch):
    original = Checkpoints._commit

    def slow(self, *arguments):
        time.sleep(0.5)
        original(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_commit", slow)


def test_saves_that_are_waited_for(open_run, slow_commit):
    run = open_run(wait=True)
    run.save(1, small_state())
    assert run.steps() == [1]
    with no_room(), pytest.raises(OSError, match="step 2 could not be saved"):
        run.save(2, small_state(2))
    run.check()


def test_check_does_not_wait(open_run, slow_commit):
    run = open_run()
    run.save(1, small_state())
    begin = time.monotonic()
    assert run.check() == [], "a step is told of once it is whole, and not before"
    assert time.monotonic() - begin < 0.3
    run.wait()
    (whole,) = run.check()
    assert whole.step == 1 and whole.stalled < whole.seconds and run.steps() == [1]
    assert run.check() == []


def test_a_step_that_failed_is_not_taken_for_saved(open_run):
    """It is not the latest, and the same step is saved by the next call and not passed over (maxtext#5260: a failed
    save counts as the latest, and saves up to its step are skipped)."""
    run = open_run()
    saved(run, 1)
    with no_room():
        run.save(2, small_state(2))
        with pytest.raises(OSError):
            run.wait()
    assert run.latest() == 1
    state = saved(run, 2)
    assert run.latest() == 2
    assert_same(run.restore(2, abstract(state))[0], state)
    assert saved(run, 3) and run.steps() == [1, 2, 3]


@pytest.mark.parametrize("size", [0, 1, 30, 90, 200, 500, 1000, 2000])
def test_full_disk_at_any_file(size, open_run):
    """Whichever file it is that finds no room: the step before stays, and can be restored."""
    run = open_run(keep_last=1)
    state = saved(run, 1)
    with no_room(size):
        try:
            saved(run, 2)
        except OSError as error:
            assert "\n" not in str(error) and "free some space, and resume" in str(error)
    assert run.steps() in ([1], [2])
    if run.steps() == [1]:
        assert_same(run.restore(1, abstract(state))[0], state)
    assert run.steps() == [1] or size >= 1000
    run.verify(run.latest())


def test_read_only_folder(open_run, monkeypatch):
    run = open_run()
    saved(run, 1)
    original = os.mkdir

    def mkdir(path, *arguments, **options):
        if "00000002" in os.fspath(path):
            raise OSError(errno.EROFS, "Read-only file system", path)
        original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        with pytest.raises(
            OSError, match="step 2 could not be saved.*Read-only file system.*can be written, and resume"
        ):
            saved(run, 2)
    assert run.steps() == [1]


# The same step again, and steps of other runs.


def test_a_step_that_is_there_is_replaced(open_run, model):
    """The last save of a run may meet one of the same step; what was said last holds (orbax#2657: that save raised, and
    the last weights were lost)."""
    run = open_run()
    saved(run, 5, seed=1, version=1)
    for seed in (2, 3):
        state = saved(run, 5, seed=seed, version=seed)
        back, extra = run.restore(5, abstract(state))
        assert_same(back, state)
        assert extra == {"version": seed}
    assert run.steps() == [5]
    names = {path.name for path in (model.parent / "run/checkpoints/00000005").iterdir()}
    assert names == {"config.json", "tokenizer.json", "manifest.json", "state-2"}


def test_a_step_stays_until_its_replacement_is_whole(open_run):
    """The other side of orbax#2657: to replace a step is not to lose it."""
    run = open_run()
    state = saved(run, 5, seed=1)
    with no_room():
        run.save(5, small_state(2))
        with pytest.raises(OSError):
            run.wait()
    assert_same(run.restore(5, abstract(state))[0], state)
    again = saved(open_run(), 5, seed=2)
    assert_same(run.restore(5, abstract(state))[0], again)


class Killed(Exception):
    """Stands for kill -9: nothing handles it."""


@pytest.mark.parametrize("moment", ["before the manifest", "behind the manifest"])
def test_a_step_stays_whole_when_its_replacement_is_of_another_model_and_killed(moment, open_run, model, monkeypatch):
    """config.json belongs to either the old step or the new one, as the manifest does."""

    def kill(*arguments):
        if threading.current_thread().name.startswith("checkpoint"):  # that commits
            raise Killed
        return original(*arguments)

    folder = model.parent / "run/checkpoints/00000005"
    old = saved(open_run(), 5, seed=1)
    (model / "config.json").write_text('{"model_type": "qwen2", "rope_theta": 1e6}')
    run, new = open_run(), small_state(2)
    before = moment == "before the manifest"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        name = "small_files" if before else "_finish_replacing"
        original = getattr(module, name)
        patch.setattr(module, name, kill)
        run.save(5, new)
        run.wait()
    run = open_run()
    run.verify(5)
    assert_same(run.restore(5, abstract(old))[0], old if before else new)
    assert ("rope_theta" in (folder / "config.json").read_text()) != before
    again = saved(run, 5, seed=3)
    assert_same(open_run().restore(5, abstract(again))[0], again)
    assert "rope_theta" in (folder / "config.json").read_text()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_new_run_does_not_mix_with_an_old_one(open_run):
    """Neither are its early steps passed over silently (orbax#527), nor does it push out the old one's."""
    saved(open_run(), 100)
    run = open_run(keep_last=1)
    with pytest.raises(
        ValueError, match="holds step 100 of an earlier run, and step 10 of this one does not continue it"
    ):
        run.save(10, small_state())
    assert run.steps() == [100]


def test_going_on_from_an_earlier_step_sets_later_ones_aside(open_run, model):
    run = open_run(keep_last=5)
    for step in (10, 20, 30):
        saved(run, step)
    run = open_run(keep_last=2)
    run.restore(10, abstract(small_state()))
    assert run.latest() == 30
    saved(run, 15)
    assert run.steps() == [10, 15]
    folder = model.parent / "run/checkpoints/00000020"
    assert (folder / "manifest.abandoned.json").exists() and (folder / "state-0").is_dir()
    state = saved(run, 20, seed=77)
    assert run.steps() == [15, 20]
    assert not (folder / "manifest.abandoned.json").exists() and not (folder / "state-0").exists()
    assert_same(run.restore(20, abstract(state))[0], state)


def test_steps_are_looked_up_and_not_remembered(open_run, model):
    """maxtext#5260: a cache of steps held one whose save had failed."""
    run, other = open_run(), open_run()
    saved(run, 1)
    assert other.steps() == [1]
    saved(run, 2)
    (model.parent / "run/checkpoints/00000002/manifest.json").unlink()
    assert (run.latest(), other.latest()) == (1, 1)


# What is kept, and what is removed.


@pytest.mark.parametrize(
    ("last", "every", "expected"),
    [
        (1, None, {50}),
        (2, None, {40, 50}),
        (9, None, {0, 10, 20, 30, 40, 50}),
        (1, 20, {20, 40, 50}),
        (2, 25, {40, 50}),
    ],
)
def test_which_steps_are_kept(last, every, expected):
    assert kept([50, 0, 10, 20, 30, 40], last, every) == expected


def test_old_steps_go_and_what_is_not_ours_stays(open_run, model):
    run = open_run(keep_last=2, keep_every=2)
    folder = model.parent / "run/checkpoints"
    (folder / "00000009").mkdir(parents=True)
    (folder / "00000009/thesis.txt").write_text("years of work")
    (folder / "notes").mkdir()
    for step in (1, 2, 3):
        saved(run, step)
    (folder / "00000003/mine.txt").write_text("years of work")
    for step in (4, 5, 6):
        saved(run, step)
    assert run.steps() == [2, 4, 5, 6]
    assert (folder / "00000009/thesis.txt").exists() and (folder / "notes").is_dir()
    assert [path.name for path in (folder / "00000003").iterdir()] == ["mine.txt"]
    assert not (folder / "00000001").exists()


def test_a_step_goes_only_once_the_next_is_whole(open_run):
    run = open_run(keep_last=1)
    saved(run, 1)
    with no_room():
        run.save(2, small_state(2))
        with pytest.raises(OSError):
            run.wait()
    assert run.steps() == [1]
    saved(run, 3)
    assert run.steps() == [3]


def test_a_step_that_cannot_be_removed_does_not_stop_the_run(open_run, monkeypatch, caplog):
    run = open_run(keep_last=1)
    saved(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_remove_step", lambda place: (_ for _ in ()).throw(OSError("is busy")))
        saved(run, 2)
    assert run.steps() == [1, 2]
    assert "an old checkpoint could not be removed: is busy" in caplog.text
    saved(run, 3)
    assert run.steps() == [3]


def test_others_wait_long_for_a_slow_disk_but_not_until_old_steps_are_gone(open_run, monkeypatch):
    """Orbax's 300 seconds would have them fail for a step that was saved."""
    run = open_run(keep_last=1)
    saved(run, 1)
    seen = []

    async def barrier(key, *, operation_id, timeout=300):
        seen.append((timeout, run.steps()))

    original = Checkpoints._agreed

    def agreed(self, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(module.jax, "process_count", lambda: 2)
            patch.setattr(module.ocp.multihost, "sync_global_processes", barrier)
            original(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_agreed", agreed)
    saved(run, 2)
    assert seen == [(3600, [1, 2])]
    assert run.steps() == [2]


def test_remains_of_a_crash_are_removed_and_nothing_else(open_run, model):
    folder = model.parent / "run/checkpoints"
    for name in ("00000002/state-0.orbax-checkpoint-tmp/state", "00000003/state-0/state", "00000004/other/state-0"):
        (folder / name).mkdir(parents=True)
    (folder / "00000003/.manifest.json.partial").write_text("{")
    (folder / "00000003/mine.txt").write_text("years of work")
    (folder / "00000005/state-0").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):  # killed just ahead of the manifest
        (folder / "00000005" / name).write_bytes((model / name).read_bytes())
    run = open_run()
    assert run.steps() == []
    saved(run, 2)
    assert run.steps() == [2]
    assert [path.name for path in (folder / "00000003").iterdir()] == ["mine.txt"]
    assert (folder / "00000004/other/state-0").is_dir() and not (folder / "00000005").exists()
    run.verify(2)


@pytest.mark.parametrize(("options", "message"), [({"keep_last": 0}, "keep_last"), ({"keep_every": 0}, "keep_every")])
def test_numbers_that_make_no_sense(options, message, open_run):
    with pytest.raises(ValueError, match=f"{message} must be at least 1"):
        open_run(**options)


def test_a_model_without_config(tmp_path):
    with pytest.raises(ValueError, match="config.json is missing"):
        Checkpoints(tmp_path / "run", tmp_path)


# Crashes.

WRITER = """
import sys
import jax.numpy as jnp
from train.checkpoints import Checkpoints

run = Checkpoints(sys.argv[1], sys.argv[2], keep_last=2)
first = run.latest()
first = 0 if first is None else first + 1
print("ready", flush=True)
for step in range(first, first + 1000):
    state = {f"params.{i}": jnp.full((200, 300), step * 10 + i, jnp.float32) for i in range(10)}
    run.save(step, state, {"step": step})
    if step > first:  # the save of the step before has ended by then
        print(step - 1, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_while_saving(kills, open_run, model, tmp_path):
    """What was reported as saved is there, whole; nothing else is listed that is not; and the next run saves on."""
    draw = random.Random(0)
    reported = -1
    wanted = {f"params.{i}": jax.ShapeDtypeStruct((200, 300), jnp.float32) for i in range(10)}
    for _ in range(kills):
        command = [sys.executable, "-c", WRITER, tmp_path / "run/checkpoints", model]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0.2, 1.5))
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split()
        assert process.returncode == -signal.SIGKILL
        reported = max([reported, *map(int, lines)])
        run = open_run()
        steps = run.steps()
        assert reported == -1 or steps[-1] >= reported
        for step in steps:
            run.verify(step)
            state, extra = run.restore(step, wanted)
            assert extra == {"step": step}
            assert all((array == step * 10 + i).all() for i, array in enumerate(state.values()))
    assert reported > 0


TWO = """
import os, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sharding import make_mesh
from train.checkpoints import Checkpoints

mesh = make_mesh("fsdp=8")
split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
values = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)

def placed(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

run = Checkpoints(sys.argv[3], sys.argv[4], keep_last=1)
for step in (1, 2):
    run.save(step, {"params": placed(values + step, split), "step": placed(np.int32(step), whole)}, {"step": step})
run.wait()
assert run.latest() == 2

def full(*_):
    raise OSError(28, "No space left on device")

if jax.process_index() == 0:
    commit, Checkpoints._commit = Checkpoints._commit, full
try:
    run.save(2, {"params": placed(values, split), "step": placed(np.int32(0), whole)})
    run.wait()
except OSError as error:
    assert "step 2 could not be saved" in str(error)
else:
    print("this process takes the step for replaced, as if the first one had not failed", file=sys.stderr, flush=True)
    os._exit(1)  # which waits for no other process
if jax.process_index() == 0:
    Checkpoints._commit = commit
run.verify(2)
state, extra = run.restore(2, {
    "params": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=split),
    "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
})
assert extra == {"step": 2}
for shard in state["params"].addressable_shards:
    assert (np.asarray(shard.data) == (values + 2)[shard.index]).all()
run.close()
"""


def test_two_processes_save_and_one_resumes(open_run, model, tmp_path):
    command = [sys.executable, "-c", TWO, free_address()]
    rest = [tmp_path / "run/checkpoints", model]
    processes = [subprocess.Popen([*command, str(i), *rest], stderr=subprocess.PIPE, text=True) for i in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    wanted = {"params": jax.ShapeDtypeStruct((8, 6), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    state, extra = open_run().restore(2, wanted)
    assert extra == {"step": 2}
    np.testing.assert_array_equal(state["params"], np.arange(48, dtype=np.float32).reshape(8, 6) + 2)
