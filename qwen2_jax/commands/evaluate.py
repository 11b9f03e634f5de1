"""`qwen2-jax evaluate`: how good a model is, on benchmarks and on long inputs."""

from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import subcommand

from qwen2_jax.command import parse
from qwen2_jax.commands import evaluate_bench, evaluate_lm_eval, evaluate_needle, evaluate_perplexity, evaluate_suite

_JOBS = (evaluate_lm_eval, evaluate_suite, evaluate_needle, evaluate_perplexity, evaluate_bench)

Job = (
    Annotated[evaluate_lm_eval.Options, subcommand(evaluate_lm_eval.NAME)]
    | Annotated[evaluate_suite.Options, subcommand(evaluate_suite.NAME)]
    | Annotated[evaluate_needle.Options, subcommand(evaluate_needle.NAME)]
    | Annotated[evaluate_perplexity.Options, subcommand(evaluate_perplexity.NAME)]
    | Annotated[evaluate_bench.Options, subcommand(evaluate_bench.NAME)]
)


def main(argv: Sequence[str]) -> int:
    options: Any = parse(Job, argv or ["--help"], prog="qwen2-jax evaluate")
    (job,) = (module for module in _JOBS if isinstance(options, module.Options))
    return job.run(options)
