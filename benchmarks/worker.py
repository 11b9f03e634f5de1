"""A process that runs one framework: requests come in as lines of JSON, answers go out the same way.

Each framework has a process of its own: its memory is its own, and its threads sleep while the other one is timed.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.machine import peak_memory

ROOT = Path(__file__).resolve().parents[1]
"""Where processes start, so that they find these packages."""

_SETTLE = 0.25
"""Seconds before each answer: the thread pools of the framework that ran before spin for a while before they sleep."""


class Engine(Protocol):
    """One framework. Made in its own process, with its libraries imported and its device started."""

    def about(self) -> dict[str, Any]:
        """Versions, threads, and the "device" that it computes on."""
        ...

    def load(self, folder: Path) -> None:
        """Loads a checkpoint; returns when every weight is in memory."""
        ...

    def prefill(self, prompts: np.ndarray) -> np.ndarray:
        """Runs prompts [B, T] into a new cache; returns each row's most probable next token [B]."""
        ...

    def decode(self, prompts: np.ndarray, new: int) -> tuple[float, np.ndarray]:
        """Continues prompts [B, T] by one token, then greedily by `new`: seconds for those, all tokens [B, 1 + new]."""
        ...

    def device_memory(self) -> int | None:
        """Bytes of an accelerator's memory in use at most so far; None where the host's memory is all there is."""
        ...


def serve(make: Callable[[], Any], answer: Callable[..., dict[str, Any]] | None = None) -> None:
    """Answers requests from standard input until it ends.

    Args:
      make: the engine, called when everything is set up.
      answer: answer(engine, task, **arguments) -> what to send back; by default the engine is an `Engine`.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    engine = make()
    for line in sys.stdin:
        time.sleep(_SETTLE)
        begin = time.perf_counter()
        reply = (answer or _answer)(engine, **json.loads(line))
        reply["wall_seconds"] = time.perf_counter() - begin
        reply |= {"peak_memory": peak_memory(), "peak_device_memory": engine.device_memory()}
        answers.write(json.dumps(reply) + "\n")


def _answer(engine: Engine, task: str, **arguments: Any) -> dict[str, Any]:
    if task == "about":
        return engine.about()
    if task == "load":
        engine.load(Path(arguments["folder"]))
        return {}
    size = (arguments["rows"], arguments["prompt"])
    prompts = np.random.default_rng(0).integers(arguments["vocabulary"], size=size, dtype=np.int32)
    if task == "prefill":
        return {"tokens": engine.prefill(prompts).tolist()}
    assert task == "decode", task
    seconds, tokens = engine.decode(prompts, arguments["new"])
    return {"seconds_per_step": seconds / arguments["new"], "tokens": tokens.tolist()}


class Worker:
    """The other end: a process that runs `module`, which calls `serve`, until it is closed."""

    def __init__(self, module: str):
        self.module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # Compiling is part of what is measured: nothing of it may come from an earlier run.
        environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def close(self) -> None:
        """Ends the process; returns when its memory is free. Does nothing the second time."""
        assert self._process.stdin and self._process.stdout
        self._process.kill()  # it holds nothing worth an orderly end
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
          RuntimeError: if the process died, with the end of what it printed.
        """
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it is dead, and the line that does not come will say so
            self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
            self._process.stdin.flush()
        if line := self._process.stdout.readline():
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace")[-2000:]
        raise RuntimeError(f"{self.module} ended with status {status} while it was asked to {task}:\n{printed}")
