"""The ways to run routed experts, by name, and the one entrance on a single device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen2_jax.einsum import einsum
from qwen2_jax.moe import ragged, tiles
from qwen2_jax.moe.experts import Experts, GroupedProduct, run_experts
from qwen2_jax.moe.loop import loop
from qwen2_jax.moe.routing import Routing
from qwen2_jax.moe.rows import combine, dispatch, group, permute

Backend = Callable[[jax.Array, jax.Array, Experts], jax.Array]
"""f(rows [R, D], expert_of_row [R] int32 in 0 .. E, experts) -> [R, D]: each row through its expert; E is nobody, whose
rows give 0 and have no gradient. Differentiable in rows and experts, whose gradients come back in their own dtypes."""

GROUPED_PRODUCTS: dict[str, GroupedProduct] = {"sorted": tiles.product, "ragged": ragged.product}


def _with_product(product: GroupedProduct) -> Backend:
    def backend(rows: jax.Array, expert_of_row: jax.Array, experts: Experts) -> jax.Array:
        groups = group(expert_of_row, experts.gate.shape[0])
        rows = permute(rows, groups.order, groups.place)
        return permute(run_experts(product, rows, groups.sizes, experts), groups.place, groups.order)

    return backend


BACKENDS: dict[str, Backend] = {
    "loop": loop,
    **{name: _with_product(product) for name, product in GROUPED_PRODUCTS.items()},
}
"""loop: the reference, every expert over every row. sorted: rows sorted by expert, in tiles, for any platform. ragged:
rows sorted by expert, through `lax.ragged_dot_general`, for TPU."""


def default_backend(platform: str) -> str:
    """The name of the fastest backend on a platform as JAX names it: cpu, gpu, tpu."""
    return "ragged" if platform == "tpu" else "sorted"


def check_moe(chosen: Any, capacity_factor: float | None) -> None:
    """Raises ValueError unless `chosen` and `capacity_factor` can stand in `Options.moe` and `.capacity_factor`."""
    if not (chosen is None or callable(chosen) or chosen in BACKENDS):
        raise ValueError(f"moe must be one of {', '.join(BACKENDS)}, got {chosen!r}")
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(f"capacity_factor must be positive, or None to drop nothing, got {capacity_factor}")


def backend_name(chosen: Any, platform: str) -> str:
    """Which backend an `Options.moe` runs on a platform, for reports; of a callable its attribute `name`."""
    if chosen is None:
        return default_backend(platform)
    return chosen if isinstance(chosen, str) else getattr(chosen, "name", type(chosen).__name__)


def moe(x: jax.Array, routing: Routing, experts: Experts, backend: str) -> jax.Array:
    """The sum over each token's choices of weight times expert(token), on one device.

    Args:
      x: [..., D] tokens.
      routing: of those tokens, [..., k].
      experts: weights of any float dtype, taken in x's dtype.
      backend: a name in `BACKENDS`.

    Returns:
      [..., D] in x's dtype, summed in float32. Nothing is dropped, however the router chose, except choices of nobody.
    """
    tokens = x.reshape(-1, x.shape[-1])
    chosen, weights = (side.reshape(len(tokens), -1) for side in (routing.experts, routing.weights))
    if backend in GROUPED_PRODUCTS:
        # As the backend of that name, but tokens go straight to their sorted rows, without a copy for each choice.
        groups = group(chosen.ravel(), experts.gate.shape[0])
        rows = run_experts(GROUPED_PRODUCTS[backend], dispatch(tokens, groups), groups.sizes, experts)
        return combine(rows, weights, groups).reshape(x.shape)
    rows = BACKENDS[backend](jnp.repeat(tokens, chosen.shape[1], axis=0), chosen.ravel(), experts)
    rows = rows.reshape(*chosen.shape, -1)
    return einsum("XkD,Xk->XD", rows, weights.astype(rows.dtype)).astype(x.dtype).reshape(x.shape)
