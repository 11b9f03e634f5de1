"""The sparse block beside dense products and beside transformers, in turns, each in a process of its own."""

import contextlib
import dataclasses
import importlib.util
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.machine import say
from benchmarks.moe_block import Shape
from benchmarks.worker import Worker

TASKS = ("forward", "forward and backward")
OURS = "qwen2-jax"
_JAX, _TORCH = "benchmarks.measure_moe_jax", "benchmarks.measure_moe_torch"
MESH = "data=2,expert=4"
"""Of 8 simulated devices: 60 experts do not divide over 8."""
_SIDES = {  # name -> module, how the experts are run, mesh
    OURS: (_JAX, "sorted", ""),
    "dense einsum": (_JAX, "dense einsum", ""),
    "transformers": (_TORCH, "grouped_mm", ""),
    "transformers, loop": (_TORCH, "eager", ""),
    "8 devices, exchange": (_JAX, "exchange", MESH),
    "8 devices, gather": (_JAX, "gather", MESH),
}
_TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
"""Of the compared numbers, between sides: difference to size, root mean square."""


def measure(dtypes: Sequence[str], repeats: int, shape: Shape) -> dict[str, Any]:
    """Measures every dtype: the report, with one entry of "results" for each line of the table."""
    torch = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    sides = {name: side for name, side in _SIDES.items() if torch or side[0] != _TORCH}
    about: dict[str, Any] = {}
    results = [result for dtype in dtypes for result in _measure_dtype(dtype, repeats, shape, sides, about)]
    return {
        "benchmark": "moe",
        "shape": dataclasses.asdict(shape),
        "mesh": MESH,
        "repeats": repeats,
        "frameworks": about,
        "results": results,
    }


def _measure_dtype(dtype: str, repeats: int, shape: Shape, sides: dict[str, Any], about: dict[str, Any]):
    seconds: dict[str, dict[str, list[float]]] = {task: defaultdict(list) for task in TASKS}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (module, side, mesh) in sides.items():
            say(f"{dtype}: {name} ...")
            workers[name] = stack.enter_context(contextlib.closing(Worker(module)))
            text = json.dumps(dataclasses.asdict(shape))
            about[name] = workers[name].ask("prepare", shape=text, dtype=dtype, side=side, mesh=mesh)
        for turn in range(1 + repeats):
            say(f"{dtype}: " + (f"{turn} of {repeats}" if turn else "compiling"))
            for task in TASKS:
                answers = {name: worker.ask(task) for name, worker in workers.items()}
                if turn:
                    for name, answer in answers.items():
                        seconds[task][name].append(answer["wall_seconds"])
                else:
                    _check_same(task, dtype, {name: answer["numbers"] for name, answer in answers.items()})
    for task in TASKS:
        medians = {name: statistics.median(values) for name, values in seconds[task].items()}
        yield {
            "dtype": dtype,
            "measure": task,
            "seconds": seconds[task],
            "medians": medians,
            "ratios": {name: median / medians[OURS] for name, median in medians.items()},
            "flops": shape.products * (3 if task != "forward" else 1),
        }


def _check_same(task: str, dtype: str, numbers: dict[str, list[list[float]]]) -> None:
    """Raises RuntimeError unless all sides computed the same."""
    for name, parts in numbers.items():
        for ours, theirs in zip(numbers[OURS], parts, strict=True):
            error = np.linalg.norm(np.subtract(ours, theirs)) / np.linalg.norm(ours)
            if not error <= _TOLERANCE[dtype]:
                raise RuntimeError(f"{task}, {dtype}: {name} differs from {OURS} by {error:.2g}")
