"""The one matrix product of the model."""

import jax
import jax.numpy as jnp


def einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of two operands of one dtype, summed and returned in float32.

    float32 operands are multiplied as float32 on every device; JAX's default would round them to bfloat16 on TPU and to
    TF32 on GPU, which is for the caller to ask for, by a dtype.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
