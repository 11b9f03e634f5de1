"""How tests compile for CPUs."""

import contextlib
from collections.abc import Iterator

import jax

QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
"""For XLA_FLAGS: the older emitters, which newer versions do not have, take half as long to compile."""
QUICK_ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": QUICK_FLAGS}
"""Of a process that compiles as the tests themselves do, and not as users do."""


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """What is compiled inside is optimized, as users' programs are; other tests save that time."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
