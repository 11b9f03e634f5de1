"""The `qwen2-jax` command: one table of jobs; a job's module is imported only when it is asked for."""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from qwen2_jax.command import exit_code

JOBS = {
    "generate": ("qwen2_jax.commands.generate", "continue prompts"),
    "chat": ("qwen2_jax.commands.chat", "talk to an Instruct model in the terminal"),
    "convert": ("convert.cli", "bring checkpoints from and to Hugging Face, and compare them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: Sequence[str]) -> int:
    job, *rest = argv or ["--help"]
    if job in ("-h", "--help"):
        print(_help())
        return 0
    if job == "--version":
        print(f"qwen2-jax {importlib.metadata.version('qwen2-jax')}")
        return 0
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS) or JOBS
        raise ValueError(f"there is no job {job!r}; did you mean {' or '.join(near)}? (qwen2-jax --help)")
    return importlib.import_module(JOBS[job][0]).main(rest)


def _help() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {job:{width}}  {does}" for job, (_, does) in JOBS.items())
    return f"usage: qwen2-jax JOB ...\n\n{jobs}\n\n`qwen2-jax JOB --help` lists a job's options."
