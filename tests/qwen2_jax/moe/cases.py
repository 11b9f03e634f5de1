"""Experts and routings that the tests of the mixture of experts share."""

import jax
import jax.numpy as jnp

from qwen2_jax.moe import Experts


def make_experts(count, width=8, inner=6, seed=0, dtype=jnp.float32):
    gate, up, down = jax.random.split(jax.random.key(seed), 3)
    return Experts(
        jax.random.normal(gate, (count, inner, width), dtype) / 2,
        jax.random.normal(up, (count, inner, width), dtype) / 2,
        jax.random.normal(down, (count, width, inner), dtype) / 2,
    )


def at_random(shape, count, choices, key):
    return jax.random.normal(key, (*shape, count))


def skewed(shape, count, choices, key):
    return jax.random.normal(key, (*shape, count)).at[..., :choices].add(4.0)


def to_one(shape, count, choices, key):
    """Every token's first choice is expert 0, its second expert 1, ..."""
    return jnp.broadcast_to(-jnp.arange(count, dtype=jnp.float32), (*shape, count))


LOGITS = {"random": at_random, "skewed": skewed, "to one": to_one}
