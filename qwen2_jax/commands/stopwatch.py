"""Seconds by phase, with XLA's compilation kept apart from the work that waited for it."""

import collections
import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """`seconds` by phase; "compile" is what JAX spent on tracing and compiling during any of them."""

    def __init__(self):
        import jax

        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._heard: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, compiled = time.perf_counter(), self.seconds["compile"]
        yield
        self.seconds[name] += time.perf_counter() - start - (self.seconds["compile"] - compiled)

    def rate(self, count: int, *names: str) -> float | None:
        """`count` for each second of some phases together, to a tenth; None if there were none."""
        seconds = sum(self.seconds.get(name, 0.0) for name in names)
        return round(count / max(seconds, 1e-3), 1) if seconds else None

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.perf_counter()
        start = end - duration_secs
        # What is compiled while a function is being traced, a trial of a kernel say, is heard first, and its time is in
        # the tracing's.
        while self._heard and self._heard[-1][0] >= start:
            within = self._heard.pop()
            self.seconds["compile"] -= within[1] - within[0]
        self._heard.append((start, end))
        self.seconds["compile"] += duration_secs
