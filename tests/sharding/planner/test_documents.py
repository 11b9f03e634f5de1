"""docs/pods.md prints what its commands print now."""

from pathlib import Path

import pytest

from sharding.planner.documents import rewritten

PODS = Path(__file__).parents[3] / "docs" / "pods.md"
REWRITE = "python -m sharding.planner.documents docs/pods.md rewrites them"


def test_the_tables_are_what_the_commands_print():
    text = PODS.read_text(encoding="utf-8")
    assert rewritten(text) == text, f"the tables of docs/pods.md are of other numbers; {REWRITE}"
    assert text.count("<!-- plans: begin") == text.count("<!-- plans: end") == rewritten(text).count("\n```sh\n") - 1


def test_every_size_is_planned_for_training_and_for_serving():
    training, serving = PODS.read_text(encoding="utf-8").split("## Serving")
    for size in ("0.5b", "1.5b", "7b", "72b", "57b-a14b"):
        assert f"| qwen2-{size} | v5" in training and f"| qwen2-{size} | v5" in serving


def test_other_commands_are_refused():
    block = (
        "<!-- plans: begin; written by python -m sharding.planner.documents -->\n\n```sh\n{}\n```\n<!-- plans: end -->"
    )
    with pytest.raises(ValueError, match="expected a line of `qwen2-jax plan`"):
        rewritten(block.format("rm -r x"))
    with pytest.raises(ValueError, match="is missing"):
        rewritten(block.format("qwen2-jax plan --model qwen2-7b --topology v5e:2x2"))
