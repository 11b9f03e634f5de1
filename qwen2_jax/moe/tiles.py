"""Grouped products as a loop over tiles of rows, which XLA compiles well for any platform.

A tile holds consecutive rows of one expert. The loop runs over the tiles in use only, so the work is the routed rows
rounded up to tiles, however they are spread over experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.einsum import einsum
from qwen2_jax.projection import take_as
from qwen2_jax.target import target_platform


@jax.custom_vjp
def product(rows: jax.Array, sizes: jax.Array, kernels: jax.Array) -> jax.Array:
    """A `qwen2_jax.moe.experts.GroupedProduct`."""
    return _by_tile("XI,OI->XO", rows, sizes, kernels)


def _product_fwd(rows, sizes, kernels):
    return product(rows, sizes, kernels), (rows, sizes, kernels)


def _product_bwd(residuals, dout):
    rows, sizes, kernels = residuals
    tiles = _tiles(sizes, rows.shape[0])

    def tile(i, dkernels):
        dkernels, *sides = _as_stored(dkernels, dout, rows)
        dy, x = (lax.dynamic_slice_in_dim(side, tiles.first[i], tiles.height) for side in sides)
        dy = jnp.where(_own_rows(tiles, i), dy, jnp.zeros_like(dy))
        return dkernels.at[tiles.expert[i]].add(einsum("XO,XI->OI", dy, x))

    dkernels = lax.fori_loop(0, tiles.used, tile, jnp.zeros(kernels.shape, jnp.float32))
    drows = _by_tile("XO,OI->XI", dout, sizes, kernels)
    return drows, None, dkernels.astype(kernels.dtype)


product.defvjp(_product_fwd, _product_bwd)


def _by_tile(equation: str, rows: jax.Array, sizes: jax.Array, kernels: jax.Array) -> jax.Array:
    tiles = _tiles(sizes, rows.shape[0])
    kernels = take_as(kernels, rows.dtype)
    width = kernels.shape[1] if equation.endswith("O") else kernels.shape[2]
    # XLA:CPU would convert a whole bfloat16 result for each tile that is written into it.
    dtype = jnp.float32 if target_platform() == "cpu" else rows.dtype

    def tile(i, out):
        out, all_rows, all_kernels = _as_stored(out, rows, kernels)
        x = lax.dynamic_slice_in_dim(all_rows, tiles.first[i], tiles.height)
        y = einsum(equation, x, all_kernels[tiles.expert[i]]).astype(dtype)
        others = lax.dynamic_slice_in_dim(out, tiles.first[i], tiles.height)
        y = jnp.where(_own_rows(tiles, i), y, others)
        return lax.dynamic_update_slice_in_dim(out, y, tiles.first[i], axis=0)

    out = lax.fori_loop(0, tiles.used, tile, jnp.zeros((rows.shape[0], width), dtype))
    return out.astype(rows.dtype)


def _as_stored(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, the first of which changes in the loop that this is called in.

    Tied to it, lest XLA:CPU turn all bfloat16 weights into float32 ahead of the loop, those of idle experts too.
    """
    return lax.optimization_barrier(arrays) if target_platform() == "cpu" else arrays


class _Tiles(NamedTuple):
    expert: jax.Array  # [tiles]
    first: jax.Array  # [tiles]; a tile at the end of the rows begins earlier than its own rows do, to fit
    begin: jax.Array  # [tiles] its own rows
    end: jax.Array  # [tiles]
    used: jax.Array  # tiles that hold anything; they come first
    height: int


def _tiles(sizes: jax.Array, rows: int) -> _Tiles:
    experts = sizes.size
    # Up to the mean load of an expert: higher tiles would be mostly padding, lower ones re-read the weights more often.
    height = min(rows, 256, max(8, 1 << max((rows // experts).bit_length() - 1, 0)))
    most = min(rows, experts + rows // height)
    tiles_of_expert = -(-sizes // height)
    first_tile = jnp.cumsum(tiles_of_expert) - tiles_of_expert
    first_row = jnp.cumsum(sizes) - sizes
    expert = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), tiles_of_expert, total_repeat_length=most)
    begin = first_row[expert] + (jnp.arange(most, dtype=jnp.int32) - first_tile[expert]) * height
    end = jnp.minimum(begin + height, first_row[expert] + sizes[expert])
    return _Tiles(expert, jnp.minimum(begin, rows - height), begin, end, tiles_of_expert.sum(), height)


def _own_rows(tiles: _Tiles, i: jax.Array) -> jax.Array:
    """[height, 1] bool."""
    row = tiles.first[i] + jnp.arange(tiles.height, dtype=jnp.int32)
    return ((tiles.begin[i] <= row) & (row < tiles.end[i]))[:, None]
