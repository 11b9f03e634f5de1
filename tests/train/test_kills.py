"""kill -9 at random moments of a run, of its saves and of its beginning again, and disks that are full or read-only on
the way: nothing is lost that was saved."""

import collections
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
from tests.xla import QUICK_ENVIRONMENT

SCRIPT = Path(__file__).parent / "run_killed.py"
KILLS, STEPS, SAVE_EVERY = 50, 60, 5
OPTIONS = f"""--seq 16 --batch 2 --steps {STEPS} --save-every {SAVE_EVERY} --log-every 5 --warmup 2 --dtype float32
--remat none --max-skips 2""".split()


HEED_PERMISSIONS = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Lets root, too, be refused what a folder's mode does not allow, from the next program on, which it becomes."""


class Starter:
    """A process that has imported what a run needs, and makes a new process for every run."""

    def __init__(self, model: Path, cache: Path):
        environment = {
            **os.environ,
            **QUICK_ENVIRONMENT,
            "JAX_NUM_CPU_DEVICES": "1",  # with one, compiled programs may come from a cache
            "TF_CPP_MIN_LOG_LEVEL": "3",  # pages about machines that a program of the cache could have come from
            "PYTHONPATH": str(SCRIPT.parents[2]),
        }
        self._model = model
        self._process = subprocess.Popen(
            [sys.executable, "-c", HEED_PERMISSIONS, SCRIPT, cache],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._read_ahead = b""

    def start(self, folder: Path, *flags: str, healthy: int = 0, trouble: str = "") -> int:
        """Begins a run, whose disk gets into trouble after so many steps, and gives the number of its process."""
        flags = ("--out", folder, "--model", self._model, "--tokenizer", self._model, *OPTIONS, *flags)
        self._process.stdin.write(json.dumps([healthy, trouble, [*map(str, flags)]]).encode() + b"\n")
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
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
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
    draw, runs, kills, begun, ends = random.Random(0), 0, 0, set(), collections.Counter()
    while kills < KILLS:
        folder, status, waits = tmp_path / f"run{runs}", None, runs % 2 == 1
        saving = saved = 0  # the last steps whose saves were begun, and were told to be whole
        while status != 0:
            # Most while it trains and saves, some while it begins: takes up its folder, or reads a checkpoint.
            kill = ("step", draw.randint(1, 25), draw.uniform(0, 0.1))
            if draw.random() < 0.2:
                kill = draw.choice([("pid", 0, draw.uniform(0, 3)), ("ready", 1, draw.uniform(0, 0.5))])
            trouble = draw.choice(["full", "read-only"]) if draw.random() < 0.3 else ""
            flags, trouble = ["--wait-for-saves"] * waits, trouble if kills < KILLS else ""
            process = starter.start(folder, *flags, healthy=draw.randint(0, 12), trouble=trouble)
            told = starter.follow(process, kill if kills < KILLS else None)
            status = told[-1][1]
            assert status in (0, -signal.SIGKILL, *((2,) if trouble else ()))
            kills += status == -signal.SIGKILL
            ends[status, trouble] += 1
            for kind, step in told:
                if kind == "ready":
                    begun.add(step)
                    # Nothing that was whole is lost; a save that was under way may be, or not.
                    assert step in (saved, saving)
                    saving = saved = step
                elif kind == "saving":
                    # The save before was waited for. So no more than two intervals are ever at stake, the one that is
                    # being saved and the one under way, and only the latter once the save is whole.
                    assert saved == saving >= step - SAVE_EVERY
                    saving = step
                elif kind == "saved":
                    assert step == saving
                    saved = step
                elif kind == "step":
                    assert step - 1 - (saved if waits else saving) < SAVE_EVERY
            if (folder / "checkpoints").exists():
                (folder / "checkpoints").chmod(0o755)
        assert digests(folder, STEPS) == digests(whole, STEPS)
        assert curves(folder) == curves(whole)
        runs += 1
    assert len(begun) > 5, "killed at the same moments each time"
    assert ends[2, "full"] and ends[2, "read-only"], "the disk was in order each time"
