"""`qwen2-jax evaluate`: how good a model is, on benchmarks and on long inputs."""

from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import subcommand

from qwen2_jax.command import parse
from qwen2_jax.commands import evaluate_lm_eval, evaluate_needle, evaluate_perplexity

_JOBS = (evaluate_lm_eval, evaluate_needle, evaluate_perplexity)

Job = (
    Annotated[evaluate_lm_eval.Options, subcommand(evaluate_lm_eval.NAME)]
    | Annotated[evaluate_needle.Options, subcommand(evaluate_needle.NAME)]
    | Annotated[evaluate_perplexity.Options, subcommand(evaluate_perplexity.NAME)]
)


def main(argv: Sequence[str]) -> int:
    options: Any = parse(Job, argv or ["--help"], prog="qwen2-jax evaluate")
    (job,) = (module for module in _JOBS if isinstance(options, module.Options))
    return job.run(options)
