"""Which platform the program that is being traced will run on.

Some products are written in one form for CPUs and in another for accelerators. JAX's own devices decide, unless a
program is compiled for devices that are not there.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_NAMED: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def target_platform() -> str:
    """cpu, gpu or tpu."""
    return _NAMED.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is for this platform, wherever it is traced.

    JAX keeps what it has traced: a function that was traced for another platform with the same arguments is not traced
    again. (Programs for a mesh have its devices among their static arguments.)
    """
    token = _NAMED.set(platform)
    try:
        yield
    finally:
        _NAMED.reset(token)
