"""What the loop does when steps go wrong: skips them, goes back, passes over their data, and gives up in the end."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.runs import BATCH, Crash, RandomRows, crash_at, curves, digests, events
from train.loop import Loop
from train.pretraining import Pretraining
from train.run import Phase
from train.run_folder import Window, read_windows
from train.stopping import STOPPED

POISON = 263
"""A token that the loss of a batch becomes NaN by, or large, if it stands first in one of its rows."""


@dataclasses.dataclass(frozen=True)
class Poisoned(Pretraining):
    factor: float = float("nan")

    def __call__(self, config, params, batch, how, weight):
        share, sums = super().__call__(config, params, batch, how, weight)
        return share * jnp.where((batch.tokens[:, 0] == POISON).any(), self.factor, 1.0), sums


class BadRows(RandomRows):
    """With batches that are poisoned, by number."""

    def __init__(self, bad, seq, seed=0):
        super().__init__(seq, seed)
        self._bad = bad

    def __getitem__(self, index):
        row = super().__getitem__(index)
        if index // BATCH in self._bad and index % BATCH == 3:
            row.tokens[0] = POISON
        return row


@pytest.fixture
def poisoned(train_run):
    """poisoned(bad batches, folder, ...) trains on data with these in the first phase."""

    def run(bad, folder, *flags, **others):
        def rows(number, phase):
            return BadRows(bad if number == 0 else (), phase.seq, number)

        flags = ("--max-skips", 2, "--log-every", 1, *flags)
        return train_run(folder, *flags, rows=rows, objective=Poisoned(), **others)

    return run


def test_bad_steps_are_skipped_and_counted(poisoned, tmp_path):
    seen = poisoned({3, 6, 7}, tmp_path / "run")
    assert seen.batches == [(step, step - 1) for step in range(1, 13)]
    assert [(event["step"], event["in_a_row"], event["loss"]) for event in events(tmp_path / "run", "skip")] == [
        (4, 1, None),
        (7, 1, None),
        (8, 2, None),
    ]
    records = curves(tmp_path / "run")
    assert [records[step]["skipped"] for step in (3, 4, 6, 7, 8, 12)] == [0, 1, 1, 2, 3, 3]
    assert records[4]["loss"] is None and np.isfinite(records[12]["loss"])
    # The schedule counts updates: a step that was skipped does not bring the rate down.
    assert records[5]["learning_rate"] == records[4]["learning_rate"] < records[3]["learning_rate"]


def test_goes_back_and_passes_over_the_data(poisoned, tmp_path):
    folder = tmp_path / "run"
    seen = poisoned({5, 6, 7}, folder)
    assert seen.status == 0
    # Batches 5 to 7 are bad; the checkpoint before them is of step 4, so 4 is passed over as well.
    counted = dict(seen.batches)
    assert [counted[step] for step in range(1, 13)] == [0, 1, 2, 3, *range(8, 16)]
    assert read_windows(folder) == [Window(0, 4, 8, to=4)]
    (event,) = events(folder, "rollback")
    assert (event["step"], event["to"], event["passed_over"]) == (8, 4, 4)
    assert curves(folder)[12]["skipped"] == 0
    # As if the data had never held these batches.
    clean = tmp_path / "clean"
    (clean / "run").mkdir(parents=True)
    (clean / "run" / "passed_over.json").write_text("[[0, 4, 8]]")
    poisoned({}, clean / "run")
    assert digests(folder, 12) == digests(clean / "run", 12)


@pytest.mark.parametrize("stop", [8, 10])
def test_windows_survive_a_restart(stop, poisoned, tmp_path):
    """Also the loop that is killed before it saved anything behind the window, or asked to stop as it goes back.

    NVIDIA-NeMo's RL#3599: a counter of steps was taken for the place in the stream, and prompts were left out.
    """
    whole, folder = tmp_path / "whole", tmp_path / "run"
    seen = poisoned({5, 6, 7}, whole)
    taken = []

    def before(step):
        taken.append(step)
        if len(taken) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(taken) == stop + 2:
            raise Crash

    first = poisoned({5, 6, 7}, folder, before=before)
    assert first.status == 75
    again = poisoned({5, 6, 7}, folder)
    assert {**dict(first.batches), **dict(again.batches)} == dict(seen.batches)
    assert read_windows(folder) == [Window(0, 4, 8, to=4)]
    assert digests(folder, 12) == digests(whole, 12)


@pytest.mark.parametrize(("bad", "to"), [({5, 6, 7}, 4), ({6, 7, 8, 9}, 8)])
def test_killed_behind_a_rollback(bad, to, poisoned, tmp_path):
    """As RL#3599, where no checkpoint knows yet that the place in the stream is not the step; nor, if it is of a step
    among those that were skipped, that these are not in a row with what comes."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    seen = poisoned(bad, whole)
    with pytest.raises(Crash):
        poisoned(bad, folder, before=lambda step: crash_at(to + 2)(step) if read_windows(folder) else None)
    again = poisoned(bad, folder)
    assert again.batches == seen.batches[to - 12 :]
    assert read_windows(folder) == read_windows(whole) and [window.to for window in read_windows(whole)] == [to]
    assert digests(folder, 12) == digests(whole, 12)


def test_goes_back_in_this_run_only(poisoned, tmp_path):
    """Not forward, to what a run had that was abandoned by --resume."""
    folder = tmp_path / "run"
    poisoned({}, folder)
    seen = poisoned({5, 6, 7}, folder, "--resume", 4)
    (event,) = events(folder, "rollback")
    assert (event["step"], event["to"]) == (8, 4)
    assert seen.status == 0 and [step for step, _ in seen.batches] == [*range(5, 9), *range(5, 13)]


class SameRows(RandomRows):
    """Of one token again and again."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return row._replace(tokens=row.tokens * 0, targets=np.minimum(row.targets, 0))


@pytest.mark.slow
def test_another_phase_is_no_spike(train_run, tmp_path):
    """Its losses are measured against its own; so they are where a run goes on from its beginning."""
    whole, folder = tmp_path / "whole", tmp_path / "run"

    def run(out, **others):
        run = train_run.run(out, "--spikes", 3, "--save-every", 70, "--log-every", 1)
        run = dataclasses.replace(run, phases=(Phase(70), Phase(4)))
        rows = lambda number, phase: (SameRows, RandomRows)[number](phase.seq)  # noqa: E731
        return train_run(out, run=run, rows=rows, **others)

    assert run(whole).status == 0 and not events(whole, "skip")
    losses = [record["loss"] for record in curves(whole).values()]
    assert losses[70] > 10 * losses[69], "or nothing leapt up"
    with pytest.raises(Crash):
        run(folder, before=crash_at(72))
    assert [step for step, _ in run(folder).batches] == [71, 72, 73, 74]
    assert digests(folder, 74) == digests(whole, 74)


def test_one_window_behind_another(poisoned, tmp_path):
    folder = tmp_path / "run"
    seen = poisoned({5, 6, 7, 9, 10, 11}, folder)
    # Behind the first window come 8 and then the bad ones from 9 on: back to step 4 once more, past all of them.
    assert read_windows(folder) == [Window(0, 4, 8, to=4), Window(0, 8, 12, to=4)]
    assert [dict(seen.batches)[step] for step in range(4, 9)] == [3, 12, 13, 14, 15]
    assert [event["passed_over"] for event in events(folder, "rollback")] == [4, 4]


def test_a_checkpoint_among_skipped_steps(poisoned, tmp_path):
    """Going back to it does not mean to go back again at the next bad step."""
    seen = poisoned({6, 7, 8, 10}, tmp_path / "run")
    assert [event["to"] for event in events(tmp_path / "run", "rollback")] == [8]
    assert read_windows(tmp_path / "run") == [Window(0, 8, 9, to=8)]
    assert seen.batches[-1] == (12, 12)
    assert curves(tmp_path / "run")[12]["skipped"] == 3


def test_gives_up(poisoned, tmp_path):
    bad = set(range(5, 100))
    with pytest.raises(
        ValueError, match=r"the run went back 2 times, and again more than 2 steps in a row were skipped"
    ):
        poisoned(bad, tmp_path / "run", "--max-rollbacks", 2)
    assert len(events(tmp_path / "run", "rollback")) == 2
    # A new start has no more of them: else a bad stretch would be passed over again and again.
    with pytest.raises(ValueError, match="the run went back 2 times, .* or allow more by --max-rollbacks"):
        poisoned(bad, tmp_path / "run", "--max-rollbacks", 2)
    assert len(events(tmp_path / "run", "rollback")) == len(read_windows(tmp_path / "run")) == 2
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["00000000", "00000004"]


def test_goes_back_into_the_phase_before(train_run, tmp_path):
    """Its steps are taken again, with their own data; what is passed over is of the phase that failed."""
    folder = tmp_path / "run"
    phases = Phase(6), Phase(6, rope_theta=1e6)
    run = dataclasses.replace(
        train_run.run(folder, "--max-skips", 2, "--save-every", 5, "--log-every", 1), phases=phases
    )

    def rows(number, phase):
        return BadRows({0, 1, 2} if number else (), phase.seq, number)

    seen = train_run(folder, run=run, rows=rows, objective=Poisoned())
    assert seen.status == 0
    assert seen.batches == [
        *((step, step - 1) for step in range(1, 7)),
        *((7, 0), (8, 1), (9, 2)),
        (6, 5),
        *((step, step - 4) for step in range(7, 13)),
    ]
    assert read_windows(folder) == [Window(1, 0, 3, to=5)]
    assert len(events(folder, "compiled")) == 4


def test_spikes(train_run, tmp_path):
    """By option, from the 64th step on."""

    def rows(number, phase):
        return BadRows({30, 66}, phase.seq)

    flags = "--steps", 70, "--save-every", 70, "--log-every", 70, "--spikes", 6
    train_run(tmp_path / "run", *flags, rows=rows, objective=Poisoned(factor=100.0))
    (event,) = events(tmp_path / "run", "skip")
    assert event["step"] == 67 and event["loss"] > 100


def test_data_that_ends_in_an_error(train_run, tmp_path):
    class Torn(RandomRows):
        def __getitem__(self, index):
            if index >= 6 * BATCH:
                raise OSError(5, "Input/output error", "tokens-000000.bin")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="tokens-000000.bin"):
        train_run(tmp_path / "run", rows=lambda number, phase: Torn(phase.seq))
    assert train_run.seen.batches[-1] == (6, 5)
    assert (tmp_path / "run/checkpoints/00000004/manifest.json").exists()


ASKED_TWICE = """
import os, signal, sys, time
from train.stopping import watch_for_stop
with watch_for_stop() as stop:
    os.kill(os.getpid(), signal.{first})
    assert stop.seen()
    print("asked", flush=True)
    os.kill(os.getpid(), signal.{second})
    time.sleep(60)
"""


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_who_asks_twice_does_not_wait(first, second):
    done = subprocess.run(
        [sys.executable, "-c", ASKED_TWICE.format(first=first, second=second)],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "asked\n" and done.returncode == -getattr(signal, second)


def test_a_long_step_is_told_of_and_how_to_stop_it(train_run, tmp_path, monkeypatch):
    """Once each; a signal that comes while a step is waited for is heard, and no further step is begun."""
    monkeypatch.setattr("train.loop._LONG", 0)
    original = Loop._wait

    def wait(loop, step, metrics):
        looks = itertools.count()

        def is_ready():
            look = next(looks)
            if (step, look) == (3, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            return look > 4

        original(loop, step, metrics._replace(accepted=types.SimpleNamespace(is_ready=is_ready)))

    monkeypatch.setattr(Loop, "_wait", wait)
    assert train_run(tmp_path / "run", "--log-every", 6).status == STOPPED
    assert train_run.seen.batches[-1][0] == 4, "the fourth step was under way when the third was waited for"
    (running,), (stopping,) = events(tmp_path / "run", "running"), events(tmp_path / "run", "stopping")
    assert running["step"] == 1
    assert (stopping["step"], stopping["again"]) == (4, "ends the run on the spot")


def test_events_are_lines_of_json(poisoned, tmp_path):
    poisoned({1}, tmp_path / "run", "--log-every", 6, "--wait-for-saves")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    names = [record.get("event", "step") for record in map(json.loads, lines)]
    assert names == "start checkpoint compiled skip checkpoint step checkpoint step checkpoint finished".split()
