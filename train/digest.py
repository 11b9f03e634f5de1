"""`convert.digest` of arrays where they are: computed by their devices, one pass over the numbers, nothing copied."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.digest import as_text, mixed


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """16 hexadecimal digits for each array; equal for equal numbers on one device and on any mesh.

    Waits for the arrays. With several processes, each calls this in the same order and gets the same.

    Args:
      arrays: of any shapes; bool, or numbers (or random keys) of at most 32 bits. Those on a mesh share it.
    """
    # What still runs is waited for: XLA on CPU mixes up the collectives of too many programs under way.
    jax.block_until_ready(dict(arrays))
    groups: dict[Mesh | None, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
        assert mesh is None or isinstance(mesh, Mesh)
        groups.setdefault(mesh, {})[name] = array
    found = {
        name: pair for mesh, group in groups.items() for name, pair in jax.device_get(_program(mesh)(group)).items()
    }
    return {name: as_text(found[name].tolist()) for name in arrays}


@functools.cache
def _program(mesh: Mesh | None):
    # Without it the compiler might leave the sums on some of a mesh's devices, where not every process can read them.
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: jax.tree.map(sums, arrays), out_shardings=everywhere)


def sums(array: jax.Array) -> jax.Array:
    """[2] uint32: both sums of an array."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = array.reshape(1) if array.ndim == 0 else array
    rows = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim - 1):
        stride = math.prod(array.shape[axis + 1 : -1]) % 2**32
        rows += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
    columns = lax.broadcasted_iota(jnp.uint32, array.shape, array.ndim - 1)
    # Both in one reduction: over two, the compiler would keep the mixed numbers, which take more than the array.
    lanes = tuple(mixed(_bits(array), rows, columns))
    zeros = (jnp.uint32(0), jnp.uint32(0))
    return jnp.stack(lax.reduce(lanes, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(array.ndim))))


def _bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
