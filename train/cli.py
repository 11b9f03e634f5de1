"""`qwen2-jax train`: tokenize text, train on it, and look at the curves."""

import sys
from collections.abc import Callable, Sequence

from qwen2_jax.command import exit_code, keep_stdout, parse

_HELP = """usage: qwen2-jax train JOB ...

  pretrain  train on text, from scratch or from a checkpoint; goes on where it was stopped
  tokenize  make tokens of text ahead of training
  plot      draw the curves of runs

`qwen2-jax train JOB --help` lists a job's options."""


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    job, *rest = argv or ["--help"]
    if job in ("-h", "--help"):
        print(_HELP)
        return 0
    if job not in JOBS:
        raise ValueError(f"there is no job {job!r}; jobs are {', '.join(JOBS)} (qwen2-jax train --help)")
    return JOBS[job](rest)


def _tokenize(argv: Sequence[str]) -> int:
    from train.data.tokenize_job import Options, run

    return run(parse(Options, argv or ["--help"], prog="qwen2-jax train tokenize"))


def _plot(argv: Sequence[str]) -> int:
    from train.plot import Plot, run

    return run(parse(Plot, argv or ["--help"], prog="qwen2-jax train plot"))


def _pretrain(argv: Sequence[str]) -> int:
    from train.run_file import read_run

    run = read_run(argv or ["--help"])
    # Imported when it is called: these import JAX, and its processes have to meet before anything asks for devices.
    from sharding.processes import join_processes, leave_processes
    from train.pretraining import Pretraining
    from train.text import rows_of_text, validation_rows_of_text
    from train.training import train

    how = run.compute
    if join_processes(how.coordinator, how.processes, how.process):
        keep_stdout()
    status = train(run, Pretraining(run.optimization.z_loss), rows_of_text(run), validation_rows_of_text(run))
    leave_processes()
    return status


JOBS: dict[str, Callable[[Sequence[str]], int]] = {"pretrain": _pretrain, "tokenize": _tokenize, "plot": _plot}
