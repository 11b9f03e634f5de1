"""Programs for a TPU that are traced on a CPU have a TPU's forms."""

import functools

import jax
import jax.numpy as jnp
import pytest

from qwen2_jax.moe import tiles
from qwen2_jax.projection import project
from qwen2_jax.target import target_platform, tracing_for


def decode_product():
    x, kernel = jnp.ones((1, 1, 4096), jnp.bfloat16), jnp.ones((8, 4096), jnp.bfloat16)
    return functools.partial(project, "BTD,FD->BTF"), (x, kernel)


def grouped_product():
    rows, kernels = jnp.ones((16, 8), jnp.bfloat16), jnp.ones((4, 8, 8), jnp.bfloat16)
    return tiles.product, (rows, jnp.full(4, 4, jnp.int32), kernels)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without the target")
@pytest.mark.parametrize("product", [decode_product, grouped_product])
def test_forms_follow_the_target(product):
    function, arguments = product()
    # Each traced by a function of its own: JAX keeps what it has traced.
    here = jax.make_jaxpr(lambda *given: function(*given))(*arguments)
    with tracing_for("tpu"):
        there = jax.make_jaxpr(lambda *given: function(*given))(*arguments)
    assert "optimization_barrier" in str(here) and "optimization_barrier" not in str(there)


def test_the_target_is_here_unless_it_is_named():
    assert target_platform() == jax.default_backend()
    with pytest.raises(RuntimeError), tracing_for("tpu"):
        assert target_platform() == "tpu"
        raise RuntimeError
    assert target_platform() == jax.default_backend()
