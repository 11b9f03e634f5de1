"""A profile of some steps, for TensorBoard's or xprof's trace viewer."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class Profile:
    """Traces steps `first` to `last` (both included; counted from 1) of process 0 into `folder`.

    Call `before` and `after` around every step. Use it as a context manager, or close it: a run that ends among these
    steps then still leaves a trace of those it took. View with `xprof FOLDER` or TensorBoard's profile plugin.
    """

    def __init__(self, folder: Path, first: int, last: int):
        """
        Raises:
          ValueError: unless 1 <= first <= last.
        """
        if not 1 <= first <= last:
            raise ValueError(f"steps to profile count from 1, the first of them first; got {first} to {last}")
        self._folder, self._first, self._last = folder, first, last
        self._wanted = jax.process_index() == 0
        self._annotation: jax.profiler.StepTraceAnnotation | None = None
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def before(self, step: int) -> None:
        """Begins the trace if this step, which is about to be started, is one to profile."""
        if not (self._wanted and self._first <= step <= self._last):
            return
        if not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        self._annotation = jax.profiler.StepTraceAnnotation("step", step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, result: Any = None) -> None:
        """Ends the trace after the last step.

        Args:
          result: arrays that the step computes. They are waited for after the last step, or the trace would end before
            the devices do.
        """
        if self._annotation is None:
            return
        if step >= self._last:
            jax.block_until_ready(result)
        self._annotation.__exit__(None, None, None)
        self._annotation = None
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Ends a trace that is running."""
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if self._running:
            self._running = self._wanted = False
            jax.profiler.stop_trace()
