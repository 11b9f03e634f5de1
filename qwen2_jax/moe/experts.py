"""The experts' weights, and their network over rows that are sorted by expert."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

GroupedProduct = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""f(rows [R, I], sizes [E] int32, kernels [E, O, I]) -> [R, O]: the first sizes[0] rows times the first kernel, the
next sizes[1] rows times the second, and so on, summed in float32 and rounded to the rows' dtype. Rows beyond the sum of
the sizes give 0 and have no gradient. The kernels' gradient comes back in their own dtype."""


class Experts(NamedTuple):
    """The weights of E SwiGLU networks."""

    gate: jax.Array
    """[E, F, D]."""
    up: jax.Array
    """[E, F, D]."""
    down: jax.Array
    """[E, D, F]."""


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up. Its gradient keeps these two and nothing else, and is computed in float32."""
    return jax.nn.silu(gate) * up


def _swiglu_fwd(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_bwd(residuals, dy):
    gate, up, dy = (x.astype(jnp.float32) for x in (*residuals, dy))
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    return dgate.astype(residuals[0].dtype), dup.astype(residuals[1].dtype)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def run_experts(product: GroupedProduct, rows: jax.Array, sizes: jax.Array, experts: Experts) -> jax.Array:
    """Rows [R, D], sorted by expert in groups of sizes [E], each through its expert: [R, D]."""
    gate = checkpoint_name(product(rows, sizes, experts.gate), "gate")
    up = checkpoint_name(product(rows, sizes, experts.up), "up")
    return product(swiglu(gate, up), sizes, experts.down)
