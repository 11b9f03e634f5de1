"""Prefill, decoding, loading and memory: this project and transformers in turns, each in a process of its own."""

import contextlib
import importlib.util
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SIZES, write_random
from benchmarks.machine import say
from benchmarks.worker import Worker
from convert.conversion import convert_from_hf
from convert.names import arrays_of

OURS, THEIRS = "qwen2-jax", "transformers"
_MODULES = {THEIRS: "benchmarks.measure_torch", OURS: "benchmarks.measure_jax"}

PREFILL_TOKENS = 512
PROMPT_TOKENS = 128
NEW_TOKENS = 32
_TASKS: dict[str, dict[str, Any]] = {
    f"prefill of {PREFILL_TOKENS} tokens": {"task": "prefill", "rows": 1, "prompt": PREFILL_TOKENS},
    "decoding step, batch 1": {"task": "decode", "rows": 1, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS},
    "decoding step, batch 8": {"task": "decode", "rows": 8, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS},
}
_LOAD_HF, _LOAD_CONVERTED = "loading, Hugging Face folder", "loading, converted folder"
_MEMORY = "peak memory"
_WHOLE = f"whole run, {_MEMORY}"
_WHOLE_DEVICE = f"{_WHOLE} of the accelerator"
_COMPILATION = "first calls (compilation)"
_LOADS = (_LOAD_HF, f"{_LOAD_HF}, {_MEMORY}", _LOAD_CONVERTED, f"{_LOAD_CONVERTED}, {_MEMORY}")
_LINES = (*_TASKS, *_LOADS, _WHOLE, _WHOLE_DEVICE, _COMPILATION)


def measure(folder: Path, size: str, dtypes: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measures every dtype.

    Args:
      folder: an empty one, for the checkpoints.
      size: a name in `benchmarks.checkpoints.SIZES`.
      dtypes: "float32", "bfloat16".
      repeats: measurements of each kind.

    Returns:
      The report: what was measured, on what, and "results", one entry per line of the table.
    """
    config = SIZES[size]
    about: dict[str, Any] = {}
    results = []
    for dtype in dtypes:
        say(f"{dtype}: writing a checkpoint of random weights")
        hf, converted = folder / f"{dtype}-hf", folder / f"{dtype}-converted"
        write_random(hf, config, dtype)
        convert_from_hf(hf, converted)
        with contextlib.ExitStack() as stack:
            run = _Run(dtype, repeats, about, stack)
            workers = run.load(hf, converted)
            run.compute(workers, config.vocab_size)
        results += run.results()
    return {
        "benchmark": "speed",
        "model": size,
        "parameters": sum(array.size for array in arrays_of(config).values()),
        "repeats": repeats,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "frameworks": about,
        "results": results,
    }


class _Run:
    """The measurements of one dtype.

    Args:
      dtype: its name.
      repeats: measurements of each kind.
      about: where to put what each framework says about itself.
      stack: ends the processes.
    """

    def __init__(self, dtype: str, repeats: int, about: dict[str, Any], stack: contextlib.ExitStack):
        self.dtype, self.repeats = dtype, repeats
        self._about, self._stack = about, stack
        self._samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._tokens: dict[str, dict[str, Any]] = defaultdict(dict)

    def load(self, hf: Path, converted: Path) -> dict[str, Worker]:
        """Loads, each time in a new process; returns the last ones, which have the model of `hf` in memory."""
        workers: dict[str, Worker] = {}
        for turn in range(self.repeats):
            say(f"{self.dtype}: loading, {turn + 1} of {self.repeats}")
            self._load(OURS, _LOAD_CONVERTED, converted).close()
            # PyTorch would use the CPU even where JAX has an accelerator: a ratio of two machines.
            comparable = self._about[OURS]["device"] == "cpu" and _has("torch") and _has("transformers")
            for name in (THEIRS, OURS) if comparable else (OURS,):
                workers[name] = self._load(name, _LOAD_HF, hf)
                if turn < self.repeats - 1:
                    workers.pop(name).close()
        return workers

    def compute(self, workers: dict[str, Worker], vocabulary: int) -> None:
        walls: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in workers}
        for turn in range(1 + self.repeats):
            say(f"{self.dtype}: " + (f"computing, {turn} of {self.repeats}" if turn else "compiling"))
            for task, request in _TASKS.items():
                for name, worker in workers.items():
                    answer = worker.ask(**request, vocabulary=vocabulary)
                    walls[name][task].append(answer["wall_seconds"])
                    self._tokens[task][name] = answer["tokens"]
                    if turn:
                        self._note(task, name, answer.get("seconds_per_step", answer["wall_seconds"]))
        for name, worker in workers.items():
            answer = worker.ask("about")
            self._note(_WHOLE, name, answer["peak_memory"])
            self._note(_WHOLE_DEVICE, name, answer["peak_device_memory"])
            extra = sum(first - statistics.median(rest) for first, *rest in walls[name].values())
            self._note(_COMPILATION, name, max(extra, 0.0))

    def results(self) -> list[dict[str, Any]]:
        """One entry per line of the table."""
        results = []
        for line in filter(self._samples.__contains__, _LINES):
            samples = self._samples[line]
            medians = {name: statistics.median(found) for name, found in samples.items()}
            comparable = len(medians) == 2 and line != _COMPILATION
            result = {
                "dtype": self.dtype,
                "measure": line,
                "unit": "bytes" if _MEMORY in line else "seconds",
                "medians": medians,
                "ratio": medians[THEIRS] / medians[OURS] if comparable else None,
                "samples": samples,
            }
            if len(tokens := self._tokens[line]) == 2:
                result["same_tokens"] = tokens[OURS] == tokens[THEIRS]
            results.append(result)
        return results

    def _load(self, name: str, line: str, folder: Path) -> Worker:
        """A new process that has loaded `folder`."""
        worker = Worker(_MODULES[name])
        self._stack.callback(worker.close)
        self._about[name] = worker.ask("about")  # comes once libraries are imported and devices started
        answer = worker.ask("load", folder=str(folder))
        self._note(line, name, answer["wall_seconds"])
        self._note(f"{line}, {_MEMORY}", name, answer["peak_memory"])
        return worker

    def _note(self, line: str, name: str, value: float | None) -> None:
        if value is not None:
            self._samples[line][name].append(value)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
