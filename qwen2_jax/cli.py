"""The `qwen2-jax` command: one table of jobs; a job's module is imported only when it is asked for."""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from qwen2_jax.command import end_process, exit_code, interrupt_by_exception, prepare_process

JOBS = {
    "generate": ("qwen2_jax.commands.generate", "continue prompts"),
    "chat": ("qwen2_jax.commands.chat", "talk to an Instruct model in the terminal"),
    "convert": ("convert.cli", "bring checkpoints from and to Hugging Face, and compare them"),
    "evaluate": ("qwen2_jax.commands.evaluate", "score benchmarks; perplexity, facts in long prompts, speed"),
    "train": ("train.cli", "train on text, from one CPU to a pod; tokenize text; draw the curves of runs"),
    "plan": ("sharding.cli", "what a run takes on TPUs or GPUs that need not be there, and how fast it can be"),
}
PUT_AWAY = ("convert", "evaluate")
"""Jobs that have something to put away when they are interrupted; the others end on the spot."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; without one, the process's, and ends the process with it."""
    if argv is not None:
        return exit_code(lambda: _dispatch(argv))
    prepare_process()
    end_process(exit_code(lambda: _dispatch(sys.argv[1:])))


def _dispatch(argv: Sequence[str]) -> int:
    job, *rest = argv or ["--help"]
    if job in ("-h", "--help"):
        print(_help())
        return 0
    if job == "--version":
        print(f"qwen2-jax {_version()}")
        return 0
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS) or JOBS
        raise ValueError(f"there is no job {job!r}; did you mean {' or '.join(near)}? (qwen2-jax --help)")
    module = importlib.import_module(JOBS[job][0])
    if job in PUT_AWAY:
        interrupt_by_exception()
    return module.main(rest)


def _version() -> str:
    try:
        return importlib.metadata.version("qwen2-jax")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("a checkout that is not installed has no version; `pip install .` installs it") from None


def _help() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {job:{width}}  {does}" for job, (_, does) in JOBS.items())
    return f"usage: qwen2-jax JOB ...\n\n{jobs}\n\n`qwen2-jax JOB --help` lists a job's options."
