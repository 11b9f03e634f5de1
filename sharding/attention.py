"""Attention on many devices: each runs a kernel on its own rows and heads."""

import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from qwen2_jax.attention import Context, implementation_named
from qwen2_jax.rope import Rotation
from sharding.rules import check_mesh

_ROW_AXES = ("data", "fsdp", "expert")


def attention_over_heads(mesh: Mesh, implementation: str) -> Callable[..., jax.Array]:
    """An implementation of `qwen2_jax.attention.attend`, for `Options(attention=...)`, that is split over a mesh.

    The compiler can split "dense" and "chunked" by itself, but not the kernels "pallas" and "cudnn". Heads are split
    over `tensor`, rows over `data`, `fsdp` and `expert`, as many of these as divide them. No device talks to another.

    Raises:
      ValueError: for an unknown implementation or mesh axis; when called, for key/value heads that `tensor` does not
        divide.
    """
    check_mesh(mesh)
    local = implementation_named(implementation)
    heads = "tensor" if "tensor" in mesh.axis_names else None

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, rotation: Rotation, context: Context):
        if heads is not None and key.shape[1] % mesh.shape[heads]:
            raise ValueError(f"{key.shape[1]} key/value heads do not divide over {mesh.shape[heads]} devices of tensor")
        rows: tuple[str, ...] = ()
        for axis in _ROW_AXES:
            if axis in mesh.axis_names and query.shape[0] % math.prod(mesh.shape[at] for at in (*rows, axis)) == 0:
                rows = (*rows, axis)
        by_head = PartitionSpec(rows, heads)
        by_row = jax.tree.map(lambda x: PartitionSpec(rows) if x.ndim else PartitionSpec(), context)
        tables = jax.tree.map(lambda _: PartitionSpec(None, rows), rotation)
        specs = (by_head, by_head, by_head, tables, by_row)
        # Kernels do not say over which axes their results vary, so that cannot be checked.
        split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
        return split(query, key, value, rotation, context)

    return attention
