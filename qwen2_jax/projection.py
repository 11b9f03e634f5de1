"""Activations times weights: the one place where matrix products with weights are written.

Kernels are stored with their output axes first (`N H D`, `F D`, `D F`, `V D`), the order in which PyTorch stores them:
conversion reshapes and never transposes, and on a CPU one row of bfloat16 is multiplied ten times faster than with the
other order (docs/performance.md).
"""

import functools
import math

import jax
import jax.numpy as jnp

from qwen2_jax.einsum import einsum
from qwen2_jax.placement import WeightPlacement
from qwen2_jax.target import target_platform

_FEW_ROWS = 64
"""Up to here (decoding) products are written as plain matrix products, in the order that XLA:CPU runs fastest."""


def project(
    equation: str,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    placement: WeightPlacement | None = None,
) -> jax.Array:
    """`einsum(equation, x, kernel) + bias`, accumulated in float32 and rounded once.

    Args:
      equation: einsum of two operands, activations first, in the letters of the axis legend: "BTD,NHD->BTNH". Those
        of the kernel that stand in the result come last there, in the kernel's order.
      x: activations.
      kernel: weight of any float dtype, taken in x's dtype; its gradient comes back in its own.
      bias: added before the rounding, as PyTorch's linear layers do.
      dtype: of the result; x's by default.
      placement: how the kernel is spread over devices; it moves in x's dtype, its gradient in float32.
    """
    y = _contract(equation, placement, x, kernel)
    if bias is not None:
        y += align(bias.astype(jnp.float32), y)
    return y.astype(dtype or x.dtype)


def align(weight: jax.Array, x: jax.Array) -> jax.Array:
    """weight with leading axes of size 1, up to the rank of x, whose last axes it belongs to."""
    return jax.lax.expand_dims(weight, range(x.ndim - weight.ndim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(equation: str, placement: WeightPlacement | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """float32 einsum of x and a kernel taken in x's dtype.

    The gradient is written out because automatic differentiation would multiply a float32 cotangent with a bfloat16
    operand, which no accelerator has a fast instruction for, and would round a float32 kernel's gradient to bfloat16.
    """
    kernel = _gathered(placement, kernel, x.dtype)
    x_axes, kernel_axes, y_axes = _axes(equation)
    batch = "".join(axis for axis in x_axes if axis in y_axes)
    outputs = "".join(axis for axis in kernel_axes if axis in y_axes)
    sizes = dict(zip(x_axes + kernel_axes, x.shape + kernel.shape, strict=True))
    rows = math.prod(sizes[axis] for axis in batch)
    if rows > _FEW_ROWS:
        return einsum(equation, x, kernel)
    assert batch + outputs == y_axes, equation
    inputs = math.prod(sizes[axis] for axis in x_axes if axis not in y_axes)
    alone = rows == 1 and target_platform() == "cpu" and _slow_alone(x, inputs)
    flat = x.reshape(rows, inputs)
    y = _few_rows(jnp.concatenate([flat, flat]) if alone else flat, kernel.reshape(-1, inputs))
    return y[:rows].reshape([sizes[axis] for axis in y_axes])


def _few_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [M, I] times kernel [O, I] for a few rows, [M, O] float32.

    Any order of operands is right; these are the ones measured to be fast on CPU, where decoding is bound by how fast
    the kernel is read (docs/performance.md). Accelerators compile all of them to the same program.
    """
    if x.dtype == jnp.float32:
        # The unit axis lets XLA:CPU return the transposed product without a slow transposition.
        return einsum("OI,MTI->OMT", kernel, x[:, None]).transpose(1, 2, 0)[:, 0]
    if target_platform() == "cpu":
        # Tied to x, lest XLA turn every weight into float32 ahead of the decode loop and read twice as much.
        x, kernel = jax.lax.optimization_barrier((x, kernel))
    if 2 < len(x) <= 8 and kernel.size >= _LARGE_KERNEL and target_platform() == "cpu" and _OLD_CPU:
        return jnp.concatenate([einsum("MI,OI->MO", row[None], kernel) for row in x])
    return einsum("MI,OI->MO", x, kernel)


_OLD_CPU = jax.__version_info__ < (0, 11)

_LONGEST_FAST_ROW = 3072
"""XLA:CPU before jax 0.11 multiplies one bfloat16 row of up to this many inputs at 40 GB/s, a longer one at 1.7; later
releases run any single row at 1.7. Two rows run at 20 GB/s everywhere."""

_LARGE_KERNEL = 1 << 25
"""Elements from which XLA:CPU before jax 0.11 reads a bfloat16 kernel at 3 GB/s for several rows, but not for one."""


def _slow_alone(x: jax.Array, inputs: int) -> bool:
    """Whether one row is so slow on CPU that computing it twice is faster."""
    if x.shape[-1] != inputs:  # the reshape would be fused into the product's inner loop
        return True
    return x.dtype == jnp.bfloat16 and not (_OLD_CPU and inputs <= _LONGEST_FAST_ROW)


def take_as(weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A weight in the dtype of a product, rounded where it is read.

    XLA sees that a float32 weight is only ever read as bfloat16 and would round those of all layers ahead of the loop
    over layers, which takes half as much memory again. It does not move a rounding that is one of its own.
    """
    if weight.dtype == jnp.float32 and dtype == jnp.bfloat16:
        weight = jax.lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)
    return weight.astype(dtype)


def _gathered(placement: WeightPlacement | None, kernel: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    kernel = take_as(kernel, dtype)
    return kernel if placement is None else placement.gathered(kernel)


def _contract_fwd(equation, placement, x, kernel):
    return _contract(equation, placement, x, kernel), (x, kernel)


def _contract_bwd(equation, placement, residuals, dy):
    x, kernel = residuals
    x_axes, kernel_axes, y_axes = _axes(equation)
    dy = dy.astype(x.dtype)
    dkernel = _kernel_gradient(y_axes, x_axes, kernel_axes, dy, x)
    # First the kernel's, after which x is not needed: the other order would keep x, dx and dkernel at the same time.
    dy, dkernel = jax.lax.optimization_barrier((dy, dkernel))
    if placement is not None:
        dkernel = placement.scattered(dkernel)
    dx = einsum(f"{y_axes},{kernel_axes}->{x_axes}", dy, _gathered(placement, kernel, x.dtype))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_contract.defvjp(_contract_fwd, _contract_bwd)


def _kernel_gradient(y_axes: str, x_axes: str, kernel_axes: str, dy: jax.Array, x: jax.Array) -> jax.Array:
    rows = "".join(axis for axis in x_axes if axis in y_axes)
    several = len(rows) > 1 and x_axes.startswith(rows) and y_axes.startswith(rows)
    if several and x.dtype == jnp.float32 and target_platform() == "cpu":
        # XLA:CPU turns an operand around, element by element, to sum over two axes; over one it does not. Not in
        # bfloat16, of which it lacks this product, nor on accelerators, where the two axes may be split over devices.
        y_axes, x_axes = (axes.replace(rows, "X") for axes in (y_axes, x_axes))
        dy, x = (array.reshape(-1, *array.shape[len(rows) :]) for array in (dy, x))
    return einsum(f"{y_axes},{x_axes}->{kernel_axes}", dy, x)


def _axes(equation: str) -> tuple[str, str, str]:
    operands, y_axes = equation.split("->")
    x_axes, kernel_axes = operands.split(",")
    return x_axes, kernel_axes, y_axes
