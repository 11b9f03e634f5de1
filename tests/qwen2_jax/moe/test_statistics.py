"""Sums over real tokens against numpy, the load-balancing loss, and the scalars of a training log."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.moe import Routing, load_balancing_loss, route, router_metrics, router_statistics


def probabilities_of(logits):
    exponentials = np.exp(np.asarray(logits, np.float64))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(10,), (2, 5)])
def test_sums(shape):
    logits = jax.random.normal(jax.random.key(5), (*shape, 4)) * 3
    real = (jnp.arange(10, dtype=jnp.int32) < 7).reshape(shape)
    statistics = jax.jit(router_statistics)(route(logits, 2, False), real, 3)
    p = probabilities_of(logits).reshape(10, 4)[:7]
    chosen = np.argsort(-p, axis=-1)[:, :2]
    np.testing.assert_array_equal(statistics.choices, np.bincount(chosen.ravel(), minlength=4))
    np.testing.assert_allclose(statistics.probability, p.sum(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.entropy, -(p * np.log(p)).sum(), rtol=1e-5)
    assert (statistics.rows, statistics.dropped) == (7, 3)
    assert all(leaf.dtype == jnp.float32 for leaf in statistics)


def test_the_loss_pools_layers_before_the_product():
    logits = jax.random.normal(jax.random.key(5), (3, 10, 4)) * 2
    real = jnp.arange(10, dtype=jnp.int32) < 7
    layers = [router_statistics(route(layer, 2, False), real) for layer in logits]
    p = probabilities_of(logits)[:, :7].reshape(21, 4)
    chosen = np.argsort(-p, axis=-1)[:, :2]
    f = np.bincount(chosen.ravel(), minlength=4) / 21
    stacked = jax.tree.map(lambda *sums: jnp.stack(sums), *layers)
    np.testing.assert_allclose(load_balancing_loss(stacked), 4 * (f * p.mean(0)).sum(), rtol=1e-5)
    uniform = router_statistics(route(jnp.zeros((12, 6)), 6, False), jnp.ones(12, bool))
    np.testing.assert_allclose(load_balancing_loss(uniform), 6.0, rtol=1e-6)


def test_gradient_of_the_loss():
    """Through the probabilities only, and finite where one of them is zero, and for padding."""
    logits = jnp.stack([jnp.array([0.0, 1.0, 0.5]), jnp.array([0.0, 300.0, 1.0]), jnp.zeros(3)])
    real = jnp.array([True, True, False])

    def loss(logits):
        return load_balancing_loss(router_statistics(route(logits, 1, False), real))

    def oracle(logits):
        return 3 * jax.nn.softmax(logits, -1)[:2, 1].mean()  # f is (0, 1, 0)

    np.testing.assert_allclose(jax.grad(loss)(logits), jax.grad(oracle)(logits), atol=1e-7)


def test_metrics():
    experts = jnp.array([[[0], [0], [0], [1]], [[0], [1], [2], [3]]], jnp.int32)
    flat = jnp.full((2, 4, 4), 0.25)
    layers = [router_statistics(Routing(flat[0, :, :1], chosen, flat[0]), jnp.ones(4, bool), 1) for chosen in experts]
    metrics = router_metrics(jax.tree.map(lambda *sums: jnp.stack(sums), *layers))
    expected = {
        "moe/load_balancing_loss": 1.0,
        "moe/load_max_over_mean": 3.0,
        "moe/load_min_over_mean": 0.0,
        "moe/unused_experts": 2 / 8,
        "moe/router_entropy": math.log(4),
        "moe/dropped_fraction": 2 / 8,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].dtype == jnp.float32 and metrics[name].shape == ()
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_no_rows():
    routing = Routing(jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 3)) / 3)
    statistics = router_statistics(routing, jnp.zeros(2, bool))
    assert load_balancing_loss(statistics) == 0
    assert all(np.isfinite(value) for value in router_metrics(statistics).values())
