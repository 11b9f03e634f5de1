"""Seconds by phase."""

import time

import jax
import jax.numpy as jnp
import pytest

from qwen2_jax.commands.stopwatch import Stopwatch


def test_compilation_is_kept_apart_and_counted_once():
    """The inner function is traced while the outer one is."""

    @jax.jit
    def inner(x):
        time.sleep(0.4)
        return x + 1

    @jax.jit
    def outer(x):
        return inner(x) * 2

    stopwatch, start = Stopwatch(), time.perf_counter()
    with stopwatch.phase("work"):
        jax.block_until_ready(outer(jnp.ones(3)))
        time.sleep(0.2)
    took = time.perf_counter() - start
    assert stopwatch.seconds["compile"] >= 0.4 and stopwatch.seconds["work"] >= 0.2
    assert stopwatch.seconds["compile"] + stopwatch.seconds["work"] == pytest.approx(took, abs=0.02)
    assert stopwatch.rate(100, "work", "never") == pytest.approx(100 / stopwatch.seconds["work"], abs=0.1)
    assert stopwatch.rate(100, "never") is None
