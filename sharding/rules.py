"""Which mesh axis each logical axis of the model is split over.

The model names its dims ("heads", "embed", ...); this table alone knows meshes. Axes of the mesh: data, fsdp, tensor,
expert, context; a mesh may leave out any of them.
"""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import Params, abstract_params, logical_axes

PARAMETER_RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "expert_mlp": "tensor",
    "embed": "fsdp",
    "head_dim": None,
    "router": None,
    "layers": None,
}
"""Weights: wide dims over `tensor`, the model width over `fsdp`, experts over `expert`."""


def partition_spec(axes: tuple[str, ...], rules: Mapping[str, str | None], mesh: Mesh) -> PartitionSpec:
    """The spec of an array with these logical axes; mesh axes that the mesh lacks are left out."""
    return PartitionSpec(*(rules[axis] if rules[axis] in mesh.axis_names else None for axis in axes))


def param_shardings(
    config: Qwen2Config, mesh: Mesh, stacked: bool = False, rules: Mapping[str, str | None] = PARAMETER_RULES
) -> Params:
    """The parameter tree with a `NamedSharding` for each array.

    Raises:
      ValueError: if a dim is not a multiple of its mesh axis; every such array is named.
    """
    problems = []

    def sharding(path, shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> NamedSharding:
        spec = partition_spec(axes, rules, mesh)
        for size, axis, mesh_axis in zip(shape.shape, axes, spec, strict=True):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                problems.append(f"{name}: {axis} ({size}) over {mesh_axis} ({mesh.shape[mesh_axis]})")
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(
        sharding, abstract_params(config, stacked=stacked), logical_axes(config, stacked=stacked)
    )
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"dims that do not divide by their mesh axis: {shown}. Use smaller axes")
    return result
