"""One of the processes of a run, with its share of 8 simulated devices; run by test_two_processes.py."""

import hashlib
import os
import resource
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen2_jax.command import end_process, exit_code
from sharding.processes import join_processes, leave_processes
from tests.train.runs import RandomRows
from train.loop import Loop
from train.pretraining import Pretraining
from train.run_file import read_run
from train.text import rows_of_text
from train.training import train


def main(what: str, at: str, argv: list[str]) -> int:
    """Made-up rows but for --data. Prints a digest of every batch.

    Args:
      what: befalls this process: the name of a signal, or "full", when it can write no more.
      at: which step, or 0, none.
    """
    run = read_run(argv)
    join_processes(run.compute.coordinator, run.compute.processes, run.compute.process)
    assert jax.device_count() == 8
    take = Loop._take_step

    def telling(loop, number, batch):
        whole = batch if jax.process_count() == 1 else multihost_utils.process_allgather(batch, tiled=True)
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in whole)).hexdigest()
        print("batch", loop._step + 1, digest[:16], flush=True)
        if loop._step + 1 == int(at):
            if what == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            else:
                os.kill(os.getpid(), getattr(signal, what))
        return take(loop, number, batch)

    Loop._take_step = telling
    rows_of = rows_of_text(run) if run.text.data else lambda number, phase: RandomRows(phase.seq, number)
    status = train(run, Pretraining(), rows_of)
    time.sleep(jax.process_index() / 2)  # process 0, without which the others cannot be, is through first
    leave_processes()
    return status


if __name__ == "__main__":
    end_process(exit_code(lambda: main(sys.argv[1], sys.argv[2], sys.argv[3:])))
