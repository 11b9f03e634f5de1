"""The one thing that a training loop tells what it did; it adds rates, and passes records on to every output."""

import collections
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from train.report.console import console
from train.report.json_lines import JsonLines
from train.report.metrics_file import MetricsFile
from train.report.output import Output, Record
from train.report.throughput import Work, peak_memory

_INTERVALS = 20  # that the time still to go is estimated from


class Reporter:
    """Tells what a run does, on the console and in files; only in process 0, elsewhere it does nothing.

    Use it as a context manager, or close it. Steps count from 1: "step 10" is the tenth batch's, and a run that goes
    on from a checkpoint of step 10 has `first_step` 10 and reports step 11 next.

    Outputs: the console (a live display on a terminal, one line per interval elsewhere), `metrics.jsonl` in the run's
    folder, and by flag TensorBoard and Weights & Biases.
    """

    work: Work | None
    """What a token costs. A loop sets it anew when its rows become longer."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        first_step: int = 0,
        work: Work | None = None,
        tensorboard: bool = False,
        wandb: str | None = None,
        json: bool = False,
        process: int | None = None,
    ):
        """
        Args:
          folder: of the run; made if it is not there.
          total_steps: the number of the last step.
          first_step: steps that the checkpoint had which the run goes on from. Records of later steps, from a run that
            died, are superseded.
          work: for the MFU; None leaves it out.
          tensorboard: write `tensorboard/` in the folder.
          wandb: project on Weights & Biases; None for no run there. WANDB_MODE=offline and the like are heeded.
          json: print JSON objects, those of metrics.jsonl, instead of lines for people.
          process: which one this is; by default what JAX says.

        Raises:
          OSError: if the folder or its files cannot be written.
          ValueError: in every process, if a package is missing that `tensorboard` or `wandb` need.
        """
        if tensorboard:
            _require("tensorboardX", "TensorBoard", "tensorboard")
        if wandb is not None:
            _require("wandb", "Weights & Biases", "wandb")
        self.work = work
        self._total = total_steps
        self._last = first_step
        self._intervals = 0
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=_INTERVALS)
        self._outputs: list[Output] = []
        with contextlib.ExitStack() as closing:
            if (jax.process_index() if process is None else process) == 0:
                for output in _outputs(folder, total_steps, first_step, tensorboard, wandb, json):
                    self._outputs.append(output)
                    closing.push(_closer(output))
            self._closing = closing.pop_all()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outputs.clear()
        self._closing.__exit__(kind, error, trace)

    def start(self, facts: Mapping[str, str]) -> None:
        """The header: what the run is. Call it once, before the first step."""
        for output in self._outputs:
            output.start(facts)

    def tick(self, step: int) -> None:
        """Optional, as a step is begun: moves the live display's counter."""
        for output in self._outputs:
            output.tick(step)

    def step(self, record: Mapping[str, Any]) -> None:
        """One interval.

        Args:
          record: scalars by name (numbers, NumPy's or JAX's): step; loss, cross_entropy, aux_loss, gradient_norm,
            learning_rate and router metrics of that step; tokens, seconds and data_wait (seconds) of the interval, all
            devices together; skipped. Nothing but step must be there, and there may be more.
        """
        if not self._outputs:
            return
        plain = {name: _plain(value) for name, value in record.items()}
        full = {**plain, **self._rates(plain)}
        for output in self._outputs:
            output.step(full)

    def event(self, name: str, /, **fields: Any) -> None:
        """Something that happened: "checkpoint", "skip", "compiled" (seconds) and the like.

        Args:
          fields: numbers and short texts. `step` says when. A "rollback" has `to`, the step of the checkpoint that the
            run went back to: records of later steps are superseded.
        """
        plain = {key: _plain(value) for key, value in fields.items()}
        for output in self._outputs:
            output.event(name, plain)

    def close(self) -> None:
        """Writes out what is left, and leaves the terminal as it was. Once is enough, twice does no harm."""
        self.__exit__(None, None, None)

    def _rates(self, record: Record) -> dict[str, float | int | None]:
        seconds, tokens, wait = (record.get(name) for name in ("seconds", "tokens", "data_wait"))
        rate = tokens / seconds if tokens is not None and seconds else None
        work = None if rate is None else self.work
        return {
            "tokens_per_second": rate,
            "mfu": None if work is None or rate is None else work.mfu(rate),
            "mfu_6n": None if work is None or rate is None else work.mfu_6n(rate),
            "data_wait_share": wait / seconds if wait is not None and seconds else None,
            "device_memory": peak_memory(),
            "eta": self._eta(record),
            "time": time.time(),
        }

    def _eta(self, record: Record) -> float | None:
        """Seconds still to go, by the last intervals; the first one, which compiles, only as long as it is alone."""
        step, seconds = record["step"], record.get("seconds")
        assert isinstance(step, int), "a record has a step"
        if seconds is not None and step > self._last:
            self._intervals += 1
            if self._intervals == 2:
                self._recent.clear()
            self._recent.append((step - self._last, seconds))
        self._last = step
        steps = sum(count for count, _ in self._recent)
        return sum(spent for _, spent in self._recent) / steps * (self._total - step) if steps else None


def _outputs(
    folder: Path, total_steps: int, first_step: int, tensorboard: bool, wandb: str | None, json: bool
) -> Iterator[Output]:
    """All that are asked for. The console is the last: what it cannot show is in the files already."""
    folder.mkdir(parents=True, exist_ok=True)
    yield MetricsFile(folder, first_step)
    if tensorboard:
        from train.report.tensorboard import TensorBoard

        yield TensorBoard(folder / "tensorboard", first_step)
    if wandb is not None:
        from train.report.weights_and_biases import WeightsAndBiases

        yield WeightsAndBiases(folder, wandb)
    yield JsonLines(first_step) if json else console(sys.stdout, total_steps, first_step)


def _closer(output: Output) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    return lambda kind, error, trace: output.close(failed=kind is not None)


def _plain(value: Any) -> Any:
    """A Python number of a scalar of NumPy's or JAX's; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _require(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} needs the package {module}, which is not installed: pip install 'qwen2-jax[{extra}]'")
