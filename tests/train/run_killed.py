"""Starts runs that are to be killed, each in a process of its own; run by test_kills.py.

Reads the options of a run per line, as JSON. Tells of each run, in lines of a word and a number: "pid", "ready" with
the step that it goes on from, "step" as each is begun, and "ended" with the exit status.
"""

import functools
import json
import os
import sys

import jax

import sharding.rules
import train.step
import train.training
from qwen2_jax.command import exit_code
from tests.train.runs import RandomRows
from train.loop import Loop
from train.pretraining import Pretraining
from train.run_file import read_run


def tell(kind: str, number: int) -> None:
    os.write(TOLD, f"{kind} {number}\n".encode())  # in one piece, though two processes write


def run(argv: list[str]) -> int:
    begin, take = Loop.run, Loop._take_step

    def telling_run(loop):
        tell("ready", loop._step)
        return begin(loop)

    def telling_take(loop, number, batch):
        tell("step", loop._step + 1)
        return take(loop, number, batch)

    Loop.run, Loop._take_step = telling_run, telling_take
    return train.training.train(read_run(argv), Pretraining(), lambda number, phase: RandomRows(phase.seq, number))


def main(cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Shapes of the same model, which a start asks for ten times; most of a short run's time.
    for module in (sharding.rules, train.step, train.training):
        module.abstract_params = functools.cache(module.abstract_params)
    for line in sys.stdin:
        # Before anything has asked for devices, so that there are no threads that a fork would lose.
        if not (child := os.fork()):
            os._exit(exit_code(lambda line=line: run(json.loads(line))))
        tell("pid", child)
        _, status = os.waitpid(child, 0)
        tell("ended", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    TOLD = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(sys.argv[1])
