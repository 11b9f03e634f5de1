"""kill -9 at random moments of a run, of its saves and of its beginning again: nothing is lost that was saved."""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.runs import curves, digests

SCRIPT = Path(__file__).parent / "run_killed.py"
KILLS, STEPS, SAVE_EVERY = 50, 60, 5
OPTIONS = f"""--seq 16 --batch 2 --steps {STEPS} --save-every {SAVE_EVERY} --log-every 5 --warmup 2 --dtype float32
--remat none --max-skips 2""".split()


class Starter:
    """A process that has imported what a run needs, and makes a new process for every run."""

    def __init__(self, model: Path, cache: Path):
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "1",  # with one, compiled programs may come from a cache
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # pages about machines that a program of the cache could have come from
            "PYTHONPATH": str(SCRIPT.parents[2]),
        }
        self._model = model
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, cache], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._read_ahead = b""

    def start(self, folder: Path) -> int:
        """Begins a run, and gives the number of its process."""
        flags = ["--out", folder, "--model", self._model, "--tokenizer", self._model, *OPTIONS]
        self._process.stdin.write(json.dumps([*map(str, flags)]).encode() + b"\n")
        self._process.stdin.flush()
        told = self._read(60)
        assert told is not None and told[0] == "pid"
        return told[1]

    def follow(self, process: int, kill: tuple[str, int, float] | None = None) -> list[tuple[str, int]]:
        """What a run tells until it ends: by itself, or killed so many seconds after it told that, so many times."""
        told, kill_at = [], None
        if kill and kill[0] == "pid":
            kill_at = time.monotonic() + kill[2]
        while not told or told[-1][0] != "ended":
            line = self._read(120 if kill_at is None else max(0, kill_at - time.monotonic()))
            if line is not None:
                told.append(line)
                if kill and kill[0] == line[0] and [kind for kind, _ in told].count(kill[0]) == kill[1]:
                    kill_at = time.monotonic() + kill[2]
            elif kill_at is not None:
                os.kill(process, signal.SIGKILL)
                kill = kill_at = None
            else:
                raise AssertionError(f"nothing happens any more: {told[-3:]}")
        return told

    def _read(self, seconds: float) -> tuple[str, int] | None:
        while b"\n" not in self._read_ahead:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            self._read_ahead += os.read(self._process.stdout.fileno(), 1 << 16)
        line, self._read_ahead = self._read_ahead.split(b"\n", 1)
        kind, number = line.split()
        return kind.decode(), int(number)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture
def starter(model, tmp_path):
    with contextlib.closing(Starter(model, tmp_path / "programs")) as starter:
        yield starter


@pytest.mark.slow
def test_killed_at_random_moments(starter, tmp_path):
    whole = tmp_path / "whole"
    told = starter.follow(starter.start(whole))
    assert told[-1] == ("ended", 0)
    draw, runs, kills, begun = random.Random(0), 0, 0, set()
    while kills < KILLS:
        folder, reached, status = tmp_path / f"run{runs}", 0, None
        while status != 0:
            # Most while it trains and saves, some while it begins: takes up its folder, or reads a checkpoint.
            kill = ("step", draw.randint(1, 25), draw.uniform(0, 0.1))
            if draw.random() < 0.2:
                kill = draw.choice([("pid", 0, draw.uniform(0, 3)), ("ready", 1, draw.uniform(0, 0.5))])
            told = starter.follow(starter.start(folder), kill if kills < KILLS else None)
            kinds, status = dict(told), told[-1][1]
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            if "ready" in kinds:
                begun.add(kinds["ready"])
                # The save that was under way when it was killed is lost with it, none before.
                assert kinds["ready"] >= (reached - 1) // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY
            reached = max(reached, kinds.get("step", 0))
        assert digests(folder, STEPS) == digests(whole, STEPS)
        assert curves(folder) == curves(whole)
        runs += 1
    assert len(begun) > 5, "killed at the same moments each time"
