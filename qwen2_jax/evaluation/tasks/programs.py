"""From a model's answer to a program with its tests, and from how that ends to metrics. The YAML files name these."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2_jax.evaluation.sandbox import Outcome, run_program

_FENCED = re.compile(r"```(?:\w+)?\n?(.*?)(?:\n?```|\Z)", re.DOTALL)


def humaneval(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """The prompt is the beginning of a function, the answer its end."""
    return _scored(doc["task_id"], f"{doc['prompt']}{answers[0]}\n{_humaneval_tests(doc)}")


def humaneval_instruct(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """As `humaneval`, of an answer that ends where its block of code does: the harness has begun the block."""
    return _scored(doc["task_id"], f"{doc['prompt']}{answers[0].partition('```')[0]}\n{_humaneval_tests(doc)}")


def mbpp(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """The answer is the program."""
    return _scored(doc["task_id"], _with_assertions(answers[0], doc))


def mbpp_instruct(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """The answer's first block of code is the program; the harness has begun the block."""
    block = _FENCED.search(f"```python\n{answers[0]}")
    assert block is not None
    return _scored(doc["task_id"], _with_assertions(block[1], doc))


def named(problems: Sequence[str]) -> int:
    """Aggregates `problem`: how many samples could not be judged."""
    return sum(map(bool, problems))


def _humaneval_tests(doc: Mapping[str, Any]) -> str:
    return f"{doc['test']}\ncheck({doc['entry_point']})\n"


def _with_assertions(program: str, doc: Mapping[str, Any]) -> str:
    return "\n".join([program, *doc["test_list"]])


def _scored(name: object, program: str) -> dict[str, Any]:
    outcome: Outcome = run_program(program)
    lost = outcome.status == "could not run"
    return {
        "pass@1": float(outcome.passed),
        "timed_out": float(outcome.status == "timed out"),
        "problem": f"{name}: {outcome.detail}" if lost else "",
    }
