"""Starts runs that are to be killed, each in a process of its own; run by test_kills.py.

Reads a list per line, as JSON: how many steps the run takes before something befalls its disk, what, and its options.
Tells of each run, in lines of a word and a number: "pid", "ready" with the step that it goes on from, "step" as each is
begun, "saving" and "saved" with a step, as it is begun and once it is whole, and "ended" with the exit status.
"""

import functools
import itertools
import json
import os
import resource
import sys
from pathlib import Path

import jax

import sharding.rules
import train.step
import train.training
from qwen2_jax.command import exit_code
from tests.train.runs import RandomRows
from train.checkpoints import Checkpoints
from train.loop import Loop
from train.pretraining import Pretraining
from train.run_file import read_run


def tell(kind: str, number: int) -> None:
    os.write(TOLD, f"{kind} {number}\n".encode())  # in one piece, though two processes write


def fill_the_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))


def make_it_read_only(folder: Path) -> None:
    (folder / "checkpoints").chmod(0o555)


TROUBLES = {"full": fill_the_disk, "read-only": make_it_read_only}


def run(healthy: int, trouble: str, argv: list[str]) -> int:
    options = read_run(argv)
    begin, take, prepare, commit = Loop.run, Loop._take_step, Checkpoints._prepared, Checkpoints._commit
    steps = itertools.count()

    def telling_run(loop):
        tell("ready", loop._step)
        return begin(loop)

    def telling_take(loop, number, batch):
        tell("step", loop._step + 1)
        if next(steps) == healthy and trouble:
            TROUBLES[trouble](options.out)
        return take(loop, number, batch)

    def telling_prepare(checkpoints, step):
        tell("saving", step)
        return prepare(checkpoints, step)

    def telling_commit(checkpoints, manifest, *others):
        commit(checkpoints, manifest, *others)
        tell("saved", manifest.step)

    Loop.run, Loop._take_step = telling_run, telling_take
    Checkpoints._prepared, Checkpoints._commit = telling_prepare, telling_commit
    return train.training.train(options, Pretraining(), lambda number, phase: RandomRows(phase.seq, number))


def main(cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Shapes of the same model, which a start asks for ten times; most of a short run's time.
    for module in (sharding.rules, train.step, train.training):
        module.abstract_params = functools.cache(module.abstract_params)
    for line in sys.stdin:
        # Before anything has asked for devices, so that there are no threads that a fork would lose.
        if not (child := os.fork()):
            os._exit(exit_code(lambda line=line: run(*json.loads(line))))
        tell("pid", child)
        _, status = os.waitpid(child, 0)
        tell("ended", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    TOLD = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(sys.argv[1])
