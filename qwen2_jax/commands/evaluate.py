"""`qwen2-jax evaluate`: what a model makes of long inputs."""

from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import subcommand

from qwen2_jax.command import parse
from qwen2_jax.commands import evaluate_needle, evaluate_perplexity

Job = (
    Annotated[evaluate_needle.Options, subcommand("needle")]
    | Annotated[evaluate_perplexity.Options, subcommand("perplexity")]
)


def main(argv: Sequence[str]) -> int:
    options: Any = parse(Job, argv or ["--help"], prog="qwen2-jax evaluate")
    if isinstance(options, evaluate_needle.Options):
        return evaluate_needle.run(options)
    return evaluate_perplexity.run(options)
