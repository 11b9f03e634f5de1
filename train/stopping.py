"""When somebody asks a run to stop: a signal to its only process, or a notice that reaches one of many."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

STOPPED = 75
"""Exit status of a run that was asked to stop, and saved: EX_TEMPFAIL of sysexits.h, "try again later"."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this run should save and end after the current step. Made by `watch_for_stop`."""

    def __init__(self, several: bool):
        self._several, self._asked, self._stopping = several, False, False
        self._asked_for = 0

    def seen(self) -> bool:
        """Asked once per step, in every process, which all get the same answer at the same step; true from then on."""
        if self._several:
            # Not the number of the step, which a run that goes back has twice: JAX says so at one number, and once.
            self._asked_for += 1
            self._stopping |= bool(multihost_utils.reached_preemption_sync_point(self._asked_for))
            return self._stopping
        return self._asked

    @property
    def asked(self) -> bool:
        """Whether this process was asked, which it may be in the middle of a step."""
        return self._asked

    @property
    def again(self) -> str:
        """What asking once more does."""
        return "changes nothing: all processes save and end together" if self._several else "ends the run on the spot"

    def _note(self, number, frame) -> None:
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX listens for it, and tells the other processes
        elif self._asked:
            signal.signal(number, signal.SIG_DFL)  # whoever asks twice will not wait
            os.kill(os.getpid(), number)
        self._asked = True


@contextlib.contextmanager
def watch_for_stop() -> Iterator[StopRequest]:
    """Takes SIGTERM and SIGINT as requests to stop; a second one ends a run of a single process on the spot.

    Among several processes JAX's own service listens for SIGTERM, as clouds send it ahead of a preemption; one process
    that gets it is enough.
    """
    several = jax.process_count() > 1
    request = StopRequest(several)
    watched = (signal.SIGINT,) if several else _SIGNALS
    before = {number: signal.signal(number, request._note) for number in watched}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
