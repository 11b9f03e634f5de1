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
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, compiled = time.perf_counter(), self.seconds["compile"]
        yield
        self.seconds[name] += time.perf_counter() - start - (self.seconds["compile"] - compiled)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds["compile"] += duration_secs
