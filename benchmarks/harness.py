"""Evaluations by lm-evaluation-harness beside its own Hugging Face model, in turns, each in a process of its own."""

import contextlib
import dataclasses
import importlib.util
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.checkpoints import write_random
from benchmarks.harness_requests import SMALL, TINY, requests, write_tokenizer
from benchmarks.machine import say
from benchmarks.worker import Worker
from qwen2_jax.commands.harness import require_harness

OURS, THEIRS = "qwen2-jax", "HFLM"
_MODULES = {THEIRS: "benchmarks.measure_harness_torch", OURS: "benchmarks.measure_harness_jax"}

SIZES = {
    # 39 M parameters.
    "small": (dataclasses.replace(training.SMALL, tie_word_embeddings=True, max_position_embeddings=2048), SMALL),
    "tiny": (dataclasses.replace(training.TINY, tie_word_embeddings=True, max_position_embeddings=256), TINY),
}
BATCH_SIZES = (1, 8, 16)
"""Of the harness's model; each part is measured with the one that was fastest in a first turn."""

ALL = "all log-likelihoods"
_TOLERANCE = 1e-3
"""Of a continuation's log-likelihood; of a document's, for each window of it."""
_SAME_TEXTS = 0.97
"""Of greedy answers, at least: random weights have close calls, which rounding may decide."""


def measure(folder: Path, size: str, repeats: int) -> dict[str, Any]:
    """Measures every part.

    Args:
      folder: an empty one, for the checkpoint and the requests.
      size: a name in `SIZES`.
      repeats: measurements of each part.

    Returns:
      The report, with one entry of "results" for each part, and one for all that are log-likelihoods.

    Raises:
      ValueError: if lm-evaluation-harness is not installed.
      RuntimeError: if the two come to different results.
    """
    require_harness()
    config, mix = SIZES[size]
    model = folder / "model"
    write_random(model, config, "float32")
    write_tokenizer(model, config.vocab_size)
    parts = requests(mix)
    (folder / "requests.json").write_text(json.dumps(parts))
    there = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    about: dict[str, Any] = {}
    seconds: dict[str, dict[str, list[float]]] = {part: defaultdict(list) for part in parts}
    tried: dict[str, dict[int, float]] = defaultdict(dict)
    first: dict[str, float] = {}
    answers: dict[str, dict[str, Any]] = {part: {} for part in parts}
    with contextlib.ExitStack() as stack:
        names = [name for name in _MODULES if there or name == OURS]
        workers = {name: stack.enter_context(contextlib.closing(Worker(_MODULES[name]))) for name in names}
        for name, worker in workers.items():
            about[name] = worker.ask("prepare", folder=str(model), requests=str(folder / "requests.json"))
        for part in parts:
            if THEIRS in workers:
                say(f"{THEIRS}: {part}, batches of {', '.join(map(str, BATCH_SIZES))}")
                workers[THEIRS].ask("warm_up", part=part)
                for batch in BATCH_SIZES:
                    tried[part][batch] = workers[THEIRS].ask("run", part=part, batch_size=batch)["seconds"]
            say(f"{OURS}: {part}, compiling")
            first[part] = workers[OURS].ask("run", part=part)["seconds"]
        for turn in range(repeats):
            say(f"{turn + 1} of {repeats}")
            for part in parts:
                for name, worker in workers.items():
                    how = {"batch_size": min(tried[part], key=tried[part].__getitem__)} if name == THEIRS else {}
                    answers[part][name] = worker.ask("run", part=part, **how)
                    seconds[part][name].append(answers[part][name]["seconds"])
    if THEIRS in workers:
        _check_same(answers)
    results = [
        _result(part, len(parts[part]["requests"]), answers[part][OURS], seconds[part], first[part], tried[part])
        for part in parts
    ]
    scored = [part for part in parts if parts[part]["kind"] != "generate_until"]
    sums = {name: [sum(turn) for turn in zip(*(seconds[part][name] for part in scored), strict=True)] for name in about}
    counts = {name: sum(answers[part][OURS][name] for part in scored) for name in ("tokens", "computed")}
    requested = sum(len(parts[part]["requests"]) for part in scored)
    total = _result(ALL, requested, counts, sums, sum(first[part] for part in scored), {})
    results.insert(len(scored), total)
    return {
        "benchmark": "harness",
        "model": size,
        "parameters": about[OURS]["parameters"],
        "repeats": repeats,
        "frameworks": about,
        "same_texts": _same_texts(answers) if THEIRS in workers else None,
        "results": results,
    }


def _result(
    part: str,
    requested: int,
    counts: dict[str, Any],
    seconds: dict[str, list[float]],
    first: float,
    tried: dict[int, float],
) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "measure": part,
        "requests": requested,
        "tokens": counts["tokens"],
        "computed": counts["computed"],
        "seconds": seconds,
        "tokens_per_second": {name: counts["tokens"] / median for name, median in medians.items()},
        "ratio": medians[THEIRS] / medians[OURS] if THEIRS in medians else None,
        "first_call_seconds": first,
        "batch_size": min(tried, key=tried.__getitem__) if tried else None,
        "batch_sizes_tried": tried,
    }


def _same_texts(answers: dict[str, dict[str, Any]]) -> float:
    both = zip(answers["generation"][OURS]["results"], answers["generation"][THEIRS]["results"], strict=True)
    same = [ours == theirs for ours, theirs in both]
    return sum(same) / len(same)


def _check_same(answers: dict[str, dict[str, Any]]) -> None:
    for part, of_part in answers.items():
        if part == "generation":
            continue
        windows = of_part[OURS]["windows"]
        for index, (ours, theirs) in enumerate(zip(of_part[OURS]["results"], of_part[THEIRS]["results"], strict=True)):
            if abs(ours - theirs) > _TOLERANCE * windows[index]:
                raise RuntimeError(f"{part}, request {index}: log-likelihoods differ, {OURS} {ours}, {THEIRS} {theirs}")
    if (same := _same_texts(answers)) < _SAME_TEXTS:
        raise RuntimeError(f"only {same:.0%} of the greedy answers are the same")
