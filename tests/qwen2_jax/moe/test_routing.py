"""Which experts tokens go to: weights, padding, capacity."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.moe import dropped_choices, keep, route, with_capacity
from tests.qwen2_jax.moe.cases import LOGITS


@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_weights_are_probabilities_over_all_experts(shape):
    logits = jax.random.normal(jax.random.key(0), (*shape, 6)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    routing = route(logits, 3, normalise=False)
    expected = -np.sort(-probabilities, axis=-1)[..., :3]
    np.testing.assert_allclose(routing.weights, expected, rtol=1e-5)
    assert np.all(routing.weights.sum(-1) < 1)
    np.testing.assert_allclose(np.take_along_axis(probabilities, np.asarray(routing.experts), -1), expected, rtol=1e-5)
    np.testing.assert_allclose(route(logits, 3, normalise=True).weights.sum(-1), 1, rtol=1e-6)


def test_padding_chooses_nobody():
    wanted = route(jax.random.normal(jax.random.key(0), (2, 5, 6)), 3, False)
    real = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 3 > 0
    kept = keep(wanted, real[..., None])
    np.testing.assert_array_equal(kept.experts, np.where(real[..., None], wanted.experts, 6))
    np.testing.assert_array_equal(kept.weights, np.where(real[..., None], wanted.weights, 0))
    assert dropped_choices(wanted, kept) == 3 * (~real).sum()
    assert dropped_choices(kept, kept) == 0


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.3, 100.0])
def test_capacity_serves_tokens_in_order(kind, factor):
    count, choices, shape = 5, 2, (3, 7)
    wanted = route(LOGITS[kind](shape, count, choices, jax.random.key(1)), choices, False)
    wanted = keep(wanted, (jnp.arange(21, dtype=jnp.int32).reshape(shape) != 4)[..., None])
    capacity = math.ceil(factor * 21 * choices / count)
    served = np.zeros(count + 1, int)
    expected = []
    for expert in np.asarray(wanted.experts).ravel():
        served[expert] += 1
        expected.append(expert if served[expert] <= capacity else count)
    kept = with_capacity(wanted, factor)
    np.testing.assert_array_equal(kept.experts.ravel(), expected)
    np.testing.assert_array_equal(kept.weights, np.where(kept.experts < count, wanted.weights, 0))
    np.testing.assert_array_equal(kept.probabilities, wanted.probabilities)
    assert dropped_choices(wanted, kept) == np.maximum(served[:-1] - capacity, 0).sum()
    assert (factor < 100) or (dropped_choices(wanted, kept) == 0)
