"""The value and the gradient rule of RMSNorm against its definition, in float64 by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.rms_norm import rms_norm

EPS = 1e-6


def by_definition(x, scale, dy):
    """Value and gradients in float64."""
    x, scale, dy = (np.asarray(array, np.float64) for array in (x, scale, dy))
    inverse = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS)
    normed, dnormed = x * inverse, dy * scale
    dx = inverse * dnormed - x * inverse**3 * np.mean(dnormed * x, axis=-1, keepdims=True)
    return normed * scale, dx, (dy * normed).sum(axis=tuple(range(x.ndim - 1)))


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16)])
def test_value_and_gradient(shape, dtype, relative):
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = (3 * jax.random.normal(key, shape, dtype) for key in keys[:2])
    scale = jax.random.normal(keys[2], shape[-1:])
    y, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, EPS), x, scale)
    assert y.dtype == dtype
    for ours, expected in zip((y, *pull(dy)), by_definition(x, scale, dy), strict=True):
        assert np.abs(np.asarray(ours, np.float64) - expected).max() <= relative * np.abs(expected).max()


def test_rows_of_zeros_have_a_gradient():
    """Padding may be so: eps keeps the norm finite, and its gradient."""
    dx, dscale = jax.grad(lambda x, scale: rms_norm(x, scale, EPS).sum(), (0, 1))(jnp.zeros((2, 8)), jnp.ones(8))
    np.testing.assert_allclose(dx, EPS**-0.5, rtol=1e-5)
    np.testing.assert_array_equal(dscale, 0)


def test_only_the_arguments_are_kept():
    x, scale = jnp.ones((2, 3, 8)), jnp.ones(8)
    kept = jax.tree.leaves(jax.vjp(lambda x, scale: rms_norm(x, scale, EPS), x, scale)[1])
    assert sorted(array.shape for array in kept) == [(2, 3, 8), (8,)]
