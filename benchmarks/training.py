"""Training steps beside transformers with PyTorch's AdamW, in turns, each in a process of its own."""

import contextlib
import dataclasses
import importlib.util
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import write_random
from benchmarks.machine import say
from benchmarks.worker import Worker
from qwen2_jax.config import Qwen2Config
from qwen2_jax.sizes import PUBLISHED

OURS, THEIRS = "qwen2-jax", "transformers"
_MODULES = {OURS: "benchmarks.measure_training_jax", THEIRS: "benchmarks.measure_training_torch"}

SMALL = Qwen2Config(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
TINY = dataclasses.replace(
    SMALL, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)
SIZES = {"small": SMALL, "tiny": TINY, **PUBLISHED}

_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of the losses of the first steps, relative, between the two."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step takes in."""

    batch: int
    seq: int
    remat: str
    """Of this project; transformers keeps everything for "none" and "projections", or else recomputes whole layers."""
    steps: int
    """Between two looks at the clock."""

    @property
    def tokens(self) -> int:
        return self.batch * self.seq * self.steps


def measure(folder: Path, size: str, dtypes: Sequence[str], repeats: int, work: Work) -> dict[str, Any]:
    """Measures every dtype: the report, with one entry of "results" for each.

    Raises:
      RuntimeError: if the losses of the two differ.
    """
    config = SIZES[size]
    write_random(folder / "model", config, "float32")
    there = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    modules = {name: module for name, module in _MODULES.items() if there or name == OURS}
    about: dict[str, Any] = {}
    results = []
    for dtype in dtypes:
        rates, memory, losses = defaultdict(list), {}, {}
        with contextlib.ExitStack() as stack:
            workers = {
                name: stack.enter_context(contextlib.closing(Worker(module))) for name, module in modules.items()
            }
            for name, worker in workers.items():
                say(f"{dtype}: {name} ...")
                about[name] = worker.ask(
                    "prepare", folder=str(folder / "model"), dtype=dtype, **dataclasses.asdict(work)
                )
            for turn in range(1 + repeats):
                say(f"{dtype}: " + (f"{turn} of {repeats}" if turn else "compiling"))
                for name, worker in workers.items():
                    answer = worker.ask("step")
                    memory[name] = answer["peak_device_memory"] or answer["peak_memory"]
                    losses.setdefault(name, answer["losses"])
                    if turn:
                        rates[name].append(work.tokens / answer["seconds"])
        _check_same(dtype, losses)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        result = {
            "dtype": dtype,
            "tokens_per_second": rates,
            "medians": medians,
            "ratio": medians[OURS] / medians[THEIRS] if THEIRS in medians else None,
            "memory": memory,
            "flops_per_token": about[OURS]["flops_per_token"],
            "peak_flops": about[OURS]["peak_flops"],
            "losses": losses,
        }
        results.append(result)
    return {
        "benchmark": "training",
        "model": size,
        "work": dataclasses.asdict(work),
        "repeats": repeats,
        "frameworks": about,
        "results": results,
    }


def _check_same(dtype: str, losses: dict[str, list[float]]) -> None:
    for name, values in losses.items():
        for ours, theirs in zip(losses[OURS], values, strict=True):
            if not math.isclose(ours, theirs, rel_tol=_TOLERANCE[dtype]):
                raise RuntimeError(f"{dtype}: losses differ, {OURS} {losses[OURS]}, {name} {values}")
