"""Routing, the sorted experts against the loop in value and gradient, and the load-balancing loss."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.moe import (
    Experts,
    Routing,
    experts_by_loop,
    experts_by_sorting,
    load_balancing_loss,
    route,
    router_statistics,
)


def make_experts(count, width=8, inner=5, seed=0):
    gate, up, down = jax.random.split(jax.random.key(seed), 3)
    return Experts(
        jax.random.normal(gate, (count, inner, width)),
        jax.random.normal(up, (count, inner, width)),
        jax.random.normal(down, (count, width, inner)),
    )


def test_weights_are_probabilities_over_all_experts():
    logits = jax.random.normal(jax.random.key(0), (7, 6)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    routing = route(logits, 3, normalise=False)
    expected = -np.sort(-probabilities, axis=-1)[:, :3]
    np.testing.assert_allclose(routing.weights, expected, rtol=1e-5)
    assert np.all(routing.weights.sum(-1) < 1)
    np.testing.assert_allclose(np.take_along_axis(probabilities, np.asarray(routing.experts), -1), expected, rtol=1e-5)
    np.testing.assert_allclose(route(logits, 3, normalise=True).weights.sum(-1), 1, rtol=1e-6)


def skewed(tokens, count, choices, key):
    logits = jax.random.normal(key, (tokens, count))
    return logits.at[:, :choices].add(4.0)


def to_one(tokens, count, choices, key):
    return jnp.broadcast_to(-jnp.arange(count, dtype=jnp.float32), (tokens, count))


def at_random(tokens, count, choices, key):
    return jax.random.normal(key, (tokens, count))


ROUTINGS = {"random": at_random, "skewed": skewed, "to one": to_one}


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(("tokens", "count", "choices"), [(1, 6, 3), (13, 5, 1), (40, 7, 4), (300, 3, 3)])
def test_sorting_equals_the_loop(kind, tokens, count, choices):
    x = jax.random.normal(jax.random.key(1), (tokens, 8))
    logits = ROUTINGS[kind](tokens, count, choices, jax.random.key(2))
    dy = jax.random.normal(jax.random.key(3), x.shape)

    def run(backend):
        def forward(x, logits, experts):
            return backend(x, route(logits, choices, False), experts)

        y, pull = jax.vjp(forward, x, logits, make_experts(count))
        return y, pull(dy)

    ours, oracle = jax.jit(lambda: (run(experts_by_sorting), run(experts_by_loop)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), ours, oracle)


def test_no_buffer_of_tokens_times_experts_times_width():
    tokens, count, choices, width = 256, 32, 4, 24
    experts = jax.eval_shape(lambda: make_experts(count, width))

    def run(x, logits, experts):
        return jax.grad(lambda x, e: experts_by_sorting(x, route(logits, choices, False), e).sum(), (0, 1))(x, experts)

    text = jax.jit(run).lower(jnp.zeros((tokens, width)), jnp.zeros((tokens, count)), experts).compile().as_text()
    largest = max(math.prod(int(side) for side in shape.split(",")) for shape in re.findall(r"f32\[([\d,]+)\]", text))
    assert largest < tokens * count * width / 3


def test_load_balancing_loss():
    uniform = router_statistics(route(jnp.zeros((12, 6)), 6, False), jnp.ones(12, bool))
    np.testing.assert_allclose(load_balancing_loss(uniform), 6.0, rtol=1e-6)

    logits = np.asarray(jax.random.normal(jax.random.key(5), (10, 4)), np.float64)
    real = np.arange(10) < 7
    p = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[real]
    chosen = np.argsort(-p, axis=-1)[:, :2]
    f = np.array([(chosen == e).sum() / 7 for e in range(4)])
    expected = 4 * (f * p.mean(0)).sum()
    statistics = router_statistics(route(jnp.asarray(logits, jnp.float32), 2, False), jnp.asarray(real))
    np.testing.assert_allclose(load_balancing_loss(statistics), expected, rtol=1e-5)


def test_no_rows_no_loss():
    routing = Routing(jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 3)) / 3)
    assert load_balancing_loss(router_statistics(routing, jnp.zeros(2, bool))) == 0
