"""The folder of a run: its lock, its options, and the windows of data that it passes over."""

import contextlib
import dataclasses
import fcntl
import json
import shutil

import hypothesis
import hypothesis.strategies as some
import pytest

from train import run_folder
from train.run import Phase
from train.run_file import read_run
from train.run_folder import (
    OPTIONS,
    PASSED_OVER,
    STARTS,
    Window,
    add_window,
    locked,
    note_start,
    position,
    read_windows,
    went_back_to,
)


def test_the_lock(tmp_path):
    folder = tmp_path / "a" / "run"
    refused = pytest.raises(ValueError, match="another process trains into .*run; stop it, or choose another --out")
    with locked(folder), refused, locked(folder):
        pass
    with locked(folder):
        pass


def test_a_start_that_fails_takes_back_what_it_made(tmp_path):
    def fail(folder):
        with pytest.raises(RuntimeError), locked(folder):
            (folder / "model" / "phase-1").mkdir(parents=True)
            if folder.name == "text":
                (folder / "tokens").mkdir()  # which took long, and is found again
            raise RuntimeError

    (tmp_path / "old").mkdir()
    for name in ("new", "old", "text"):
        fail(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "text"]
    assert (tmp_path / "old/model").exists(), "it may be somebody's own"


def before_locking(monkeypatch, act):
    """Has `act` done between opening the lock and taking it, by the first who comes so far."""
    take, left = fcntl.flock, [act]

    def flock(*given):
        if left:
            left.pop()()
        take(*given)

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)


def test_of_two_starts_the_loser_leaves_the_winner_alone(tmp_path, monkeypatch):
    """Though it was the one that made the folder."""
    folder = tmp_path / "run"
    with contextlib.ExitStack() as winner:
        before_locking(monkeypatch, lambda: winner.enter_context(locked(folder)))
        with pytest.raises(ValueError, match="another process trains into"), locked(folder):
            pytest.fail("two have the lock")
        assert [path.name for path in folder.iterdir()] == [".lock"]
        with pytest.raises(ValueError, match="another process trains into"), locked(folder):
            pytest.fail("the lock was lost")


def test_a_lock_that_was_taken_back_is_none(tmp_path, monkeypatch):
    """By a start that failed: who has opened the file before would hold one that nobody else sees."""
    (tmp_path / "run").mkdir()
    before_locking(monkeypatch, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(ValueError, match="another process trains into"), locked(tmp_path / "run"):
        pytest.fail("two could have it")


def test_nothing_is_written_before_all_have_read(tmp_path, monkeypatch):
    """A process that came later would find its own start to be the one before."""
    note_start(read_run(["--out", str(tmp_path), "--data", "a"]), tmp_path, 0, ["1"])
    before, met = [(tmp_path / name).read_bytes() for name in (OPTIONS, STARTS)], []

    def meet(name):
        met.append([(tmp_path / name).read_bytes() for name in (OPTIONS, STARTS)])

    monkeypatch.setattr(run_folder.multihost_utils, "sync_global_devices", meet)
    note_start(read_run(["--out", str(tmp_path), "--data", "b"]), tmp_path, 4, ["2"], begun=1)
    assert met == [before] != [[(tmp_path / name).read_bytes() for name in (OPTIONS, STARTS)]]


def test_options_and_starts(tmp_path):
    run = read_run(["--out", str(tmp_path), "--data", "a", "--steps", "5", "--profile", "1", "2"])
    assert note_start(run, tmp_path, 0) == []
    again = read_run([str(tmp_path / OPTIONS)])
    assert again.text == run.text and again.optimization == run.optimization and again.output == run.output
    other = read_run(["--out", str(tmp_path), "--data", "b", "c", "--steps", "7", "--save-every", "3", "--seed", "1"])
    changes = note_start(other, tmp_path, 4)
    assert changes == ["data: ['a'] -> ['b', 'c']", "seed: 0 -> 1", "steps: 5 -> 7"]  # save_every changes no number
    assert note_start(other, tmp_path, 4, others=["x: 1 -> 2"]) == ["x: 1 -> 2"]
    phased = dataclasses.replace(other, phases=(Phase(7), Phase(2, seq=8192)))
    assert note_start(phased, tmp_path, 4) == ["phases: [] -> [{'steps': 7}, {'steps': 2, 'seq': 8192}]"]
    starts = [json.loads(line) for line in (tmp_path / STARTS).read_text().splitlines()]
    assert [(start["step"], start["changes"]) for start in starts[:3]] == [(0, []), (4, changes), (4, ["x: 1 -> 2"])]
    assert starts[0].keys() >= {"time", "command", "git", "python", "versions", "devices", "processes"}


def test_other_text_under_the_same_name(tmp_path):
    """Is refused where the run has read of it; not where it has not, or where an option says so."""
    run = read_run(["--out", str(tmp_path), "--data", "a"])
    note_start(run, tmp_path, 0, ["1", "2"])
    note_start(run, tmp_path, 0, ["3", "2"], begun=0)
    with open(tmp_path / STARTS, "a") as starts:
        starts.write('{"texts": ["3"')  # torn
    with pytest.raises(ValueError, match="the data of phase 1 is no longer what the run was trained on up to step 4"):
        note_start(run, tmp_path, 4, ["1", "2"], begun=1)
    note_start(run, tmp_path, 4, ["3", "9"], begun=1)
    with pytest.raises(ValueError, match="the data of phase 2"):
        note_start(run, tmp_path, 8, ["3", "2"], begun=2)
    faster = read_run(["--out", str(tmp_path), "--data", "a", "--learning-rate", "1e-5"])
    with pytest.raises(ValueError, match="the data of phase 2"):
        note_start(faster, tmp_path, 8, ["3", "2"], begun=2)
    other = read_run(["--out", str(tmp_path), "--data", "b"])
    assert note_start(other, tmp_path, 8, ["7", "8"], begun=2) == ["data: ['a'] -> ['b']"]
    assert note_start(other, tmp_path, 8, ["7", "8"], begun=2) == []


@pytest.mark.parametrize("text", [": [", "\x80"])
def test_damaged_options(text, tmp_path):
    (tmp_path / OPTIONS).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="run.yaml is not YAML any more"):
        note_start(read_run(["--data", "a"]), tmp_path, 0)


@pytest.mark.parametrize("text", ["[", "7", "[[1, 2]]", '[[1, 2, "x"]]', '{"a": 1}'])
def test_damaged_windows(text, tmp_path):
    (tmp_path / PASSED_OVER).write_text(text)
    with pytest.raises(ValueError, match=r"passed_over.json is damaged .*; it lists \[phase, first, stop, to\]"):
        read_windows(tmp_path)


def test_windows_come_back(tmp_path):
    assert read_windows(tmp_path) == []
    expected = [Window(0, 5, 8, to=5), Window(1, 6, 7, to=26), Window(0, 3, 9, to=3)]
    windows = []
    for count, window in enumerate(expected, 1):
        windows = add_window(tmp_path, windows, window)
        assert read_windows(tmp_path) == windows == expected[:count]
    (tmp_path / PASSED_OVER).write_text("[[0, 5, 8]]")  # of a version that did not say where it went back to
    assert read_windows(tmp_path) == [Window(0, 5, 8)]


def test_where_the_run_went_back_to():
    windows = [Window(0, 8, 11, to=8), Window(0, 5, 12, to=4)]
    assert [step for step in range(20) if went_back_to(windows[:1], step)] == [8]
    # The checkpoint of step 8 is another one since: it was saved on the way from step 4.
    assert [step for step in range(20) if went_back_to(windows, step)] == [4]
    assert not any(went_back_to([Window(0, 5, 8)], step) for step in range(20))


@hypothesis.given(rollbacks=some.lists(some.tuples(some.integers(0, 12), some.integers(1, 6)), max_size=6))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_positions_pass_over_what_went_wrong(rollbacks, tmp_path):
    """After every rollback the run takes the first batches that it has not given up, in order (NVIDIA-NeMo's RL#3599: a
    counter of steps was taken for the place in the stream)."""
    windows, given_up = [], set()
    for target, steps in rollbacks:
        taken = [index for index in range(200) if index not in given_up]
        assert [position(windows, 0, step) for step in range(30)] == taken[:30]
        # From step `target` on so many steps were taken; all of their batches are given up.
        windows = add_window(tmp_path, windows, Window(0, taken[target], taken[target + steps]))
        given_up |= set(range(taken[target], taken[target + steps]))
    assert [position(windows, 1, step) for step in range(5)] == [0, 1, 2, 3, 4]
