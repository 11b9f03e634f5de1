"""Which mesh axis each logical axis of the model is split over.

The model names its dims ("heads", "embed", ...); this table alone knows meshes. Axes of the mesh: data, fsdp, tensor,
expert, context; a mesh may leave out any of them.
"""

from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import Params, abstract_params, logical_axes

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")

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


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError for axes that no rule knows, which would silently go unused, and for Explicit ones."""
    if unknown := [name for name in mesh.axis_names if name not in MESH_AXES]:
        raise ValueError(
            f"the mesh has axes {', '.join(map(repr, unknown))}; known ones are {', '.join(MESH_AXES)}. Rename them"
        )
    if explicit := [
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    ]:
        count = len(mesh.axis_names)
        raise ValueError(
            f"axes {', '.join(explicit)} of the mesh are Explicit, but the model leaves shardings to the compiler; "
            f"make it with jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * {count})"
        )


def partition_spec(axes: tuple[str, ...], rules: Mapping[str, str | None], mesh: Mesh) -> PartitionSpec:
    """The spec of an array with these logical axes; mesh axes that the mesh lacks are left out.

    Raises:
      ValueError: as `check_mesh`.
    """
    check_mesh(mesh)
    return PartitionSpec(*(rules[axis] if rules[axis] in mesh.axis_names else None for axis in axes))


def param_shardings(
    config: Qwen2Config, mesh: Mesh, stacked: bool = False, rules: Mapping[str, str | None] = PARAMETER_RULES
) -> Params:
    """The parameter tree with a `NamedSharding` for each array.

    Raises:
      ValueError: if a dim is not a multiple of its mesh axis (every such array is named), or as `check_mesh`.
    """
    check_mesh(mesh)
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
