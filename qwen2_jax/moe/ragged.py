"""Grouped products by `lax.ragged_dot_general`: one operation, for which XLA has kernels on TPU.

On CPU XLA writes it out as dense products with every expert's weights: right, but only for small sizes.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.projection import take_as

Dims = tuple[list[int], list[int]]


@jax.custom_vjp
def product(rows: jax.Array, sizes: jax.Array, kernels: jax.Array) -> jax.Array:
    """A `qwen2_jax.moe.experts.GroupedProduct`."""
    return _rows_times_kernels(rows, sizes, kernels, contracted=2)


def _product_fwd(rows, sizes, kernels):
    return product(rows, sizes, kernels), (rows, sizes, kernels)


def _product_bwd(residuals, dout):
    rows, sizes, kernels = residuals
    # [E, O, I]: the rows of each group are what is summed over.
    dkernels = _ragged_dot(dout, rows, sizes, ([0], [0]), [], kernels.dtype)
    return _rows_times_kernels(dout, sizes, kernels, contracted=1), None, dkernels


product.defvjp(_product_fwd, _product_bwd)


def _rows_times_kernels(rows: jax.Array, sizes: jax.Array, kernels: jax.Array, contracted: int) -> jax.Array:
    # TPU's kernel wants inputs before outputs. The barrier has XLA transpose rounded weights, not float32 ones.
    kernels = lax.optimization_barrier(take_as(kernels, rows.dtype))
    out = _ragged_dot(rows, kernels, sizes, ([1], [contracted]), [0], rows.dtype)
    # What the operation leaves in rows of no group is not specified.
    grouped = jnp.arange(rows.shape[0], dtype=jnp.int32) < sizes.sum()
    return jnp.where(grouped[:, None], out, jnp.zeros_like(out))


def _ragged_dot(
    a: jax.Array, b: jax.Array, sizes: jax.Array, contracting: Dims, groups_of: list[int], dtype: jnp.dtype
) -> jax.Array:
    """The axis 0 of `a` is the ragged one, the axes `groups_of` of `b` are the groups'.

    Summed in float32 whatever the result's dtype: a float32 result to be rounded here would go through memory.
    """
    return lax.ragged_dot_general(
        a,
        b,
        sizes,
        lax.RaggedDotDimensionNumbers((contracting, ([], [])), [0], groups_of),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )
