"""`project` equals a float64 einsum, for every path it may take, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import projection
from qwen2_jax.projection import project

CASES = {
    "BTD,NHD->BTNH": ((6,), (3, 2, 6)),
    "BTNH,DNH->BTD": ((3, 2), (6, 3, 2)),
    "BTD,FD->BTF": ((6,), (5, 6)),
    "BTD,D->BT": ((6,), (6,)),
}


def operands(equation, batch, dtype):
    inputs, kernel = CASES[equation]
    x = jax.random.normal(jax.random.key(0), (*batch, *inputs), dtype)
    return x, jax.random.normal(jax.random.key(1), kernel, dtype)


def exact(equation, *arrays):
    return np.einsum(equation, *(np.asarray(array, np.float64) for array in arrays))


@pytest.mark.parametrize("equation", CASES)
@pytest.mark.parametrize("batch", [(1, 1), (2, 1), (3, 5), (7, 13)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradient(equation, batch, dtype):
    x, kernel = operands(equation, batch, dtype)
    tolerance = dict(atol=1e-5 if dtype == jnp.float32 else 0.05, rtol=1e-5 if dtype == jnp.float32 else 0.02)
    y, pull = jax.vjp(lambda x, kernel: project(equation, x, kernel), x, kernel)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), exact(equation, x, kernel), **tolerance)

    dy = jax.random.normal(jax.random.key(2), y.shape, dtype)
    x_axes, kernel_axes, y_axes = equation.replace("->", ",").split(",")
    dx, dkernel = pull(dy)
    expected = exact(f"{y_axes},{kernel_axes}->{x_axes}", dy, kernel)
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, **tolerance)
    expected = exact(f"{y_axes},{x_axes}->{kernel_axes}", dy, x)
    np.testing.assert_allclose(np.asarray(dkernel, np.float64), expected, **tolerance)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 9])
def test_every_way_of_few_bfloat16_rows(monkeypatch, old, rows):
    """The paths that are chosen by size and release, at a size where they can be afforded."""
    monkeypatch.setattr(projection, "_OLD_CPU", old)
    monkeypatch.setattr(projection, "_LONGEST_FAST_ROW", 4)
    monkeypatch.setattr(projection, "_LARGE_KERNEL", 8)
    x, kernel = operands("BTD,FD->BTF", (rows, 1), jnp.bfloat16)
    y = project("BTD,FD->BTF", x, kernel, dtype=jnp.float32)
    np.testing.assert_allclose(y, exact("BTD,FD->BTF", x, kernel), atol=1e-5)


def test_float32_master_weights_get_float32_gradients():
    x, kernel = operands("BTD,FD->BTF", (2, 3), jnp.float32)
    x = x.astype(jnp.bfloat16)
    gradient = jax.grad(lambda kernel: project("BTD,FD->BTF", x, kernel, dtype=jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32
    expected = np.broadcast_to(np.asarray(x, np.float64).sum(axis=(0, 1)), kernel.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_bias_is_added_before_rounding():
    x = jnp.array([[[128, 129]]], jnp.bfloat16)
    kernel, bias = jnp.ones((1, 2), jnp.bfloat16), jnp.full((1,), 0.75, jnp.bfloat16)
    # 257.75 rounds to 258 in bfloat16; 257 alone rounds to 256, and 256.75 then to 256.
    assert project("BTD,FD->BTF", x, kernel, bias)[0, 0, 0] == 258
