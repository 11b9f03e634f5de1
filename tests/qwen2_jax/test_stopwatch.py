"""Seconds by phase."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.commands.stopwatch import Stopwatch


def test_compilation_is_kept_apart_and_counted_once():
    """A function that is traced has others compiled on the way."""
    ones = [np.ones(size, np.float32) for size in range(3, 11)]

    @jax.jit
    def outer(x):
        time.sleep(0.4)
        with jax.ensure_compile_time_eval():
            for one in ones:
                jax.jit(jnp.sin)(one)
        return x * 2

    stopwatch, start = Stopwatch(), time.perf_counter()
    with stopwatch.phase("work"):
        jax.block_until_ready(outer(jnp.ones(3)))
        time.sleep(0.2)
    took = time.perf_counter() - start
    assert stopwatch.seconds["compile"] >= 0.4 and stopwatch.seconds["work"] >= 0.2
    assert stopwatch.seconds["compile"] + stopwatch.seconds["work"] == pytest.approx(took, abs=0.02)
    assert stopwatch.rate(100, "work", "never") == pytest.approx(100 / stopwatch.seconds["work"], abs=0.1)
    assert stopwatch.rate(100, "never") is None
