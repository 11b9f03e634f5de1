"""Where arrays live: the tables of `sharding.logical` as JAX's specs and shardings."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2_jax.cache import Cache
from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import Params, abstract_params, logical_axes
from sharding import logical
from sharding.checks import check_weights
from sharding.logical import RULES, Rules
from sharding.mesh import MESH_AXES, MeshSpec


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError for axes that no rule knows, which would silently go unused, for Explicit ones, and for what is
    no mesh."""
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}; sharding.make_mesh makes one of a text")
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


def spec_of(mesh: Mesh) -> MeshSpec:
    """The sizes of a mesh's axes. Raises ValueError as `check_mesh`."""
    check_mesh(mesh)
    return MeshSpec(**dict(mesh.shape))


def weight_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How a weight of `shape` with these logical axes is stored; see `sharding.logical.weight_axes`."""
    return PartitionSpec(*logical.weight_axes(axes, shape, mesh.shape))


def activation_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES["train"]
) -> PartitionSpec:
    """How an activation of `shape` with these logical axes (see `qwen2_jax.placement`) is split, where it divides."""
    return PartitionSpec(*(names or None for names in logical.activation_axes(axes, shape, mesh.shape, rules)))


def param_shardings(config: Qwen2Config, mesh: Mesh, stacked: bool = False) -> Params:
    """The parameter tree with a `NamedSharding` for each array.

    Raises:
      ValueError: as `sharding.checks.check_weights` and `check_mesh`.
    """
    check_weights(config, spec_of(mesh))
    return jax.tree.map(
        lambda array, axes: NamedSharding(mesh, weight_spec(axes, array.shape, mesh)),
        abstract_params(config, stacked=stacked),
        logical_axes(config, stacked=stacked),
    )


def optimizer_shardings(optimizer: Any, params: Params, shardings: Params) -> Any:
    """The state of an optax optimizer with a `NamedSharding` for each array: that of its parameter, or everywhere.

    Args:
      optimizer: an `optax.GradientTransformation`.
      params: arrays or `jax.ShapeDtypeStruct`s.
      shardings: of `param_shardings`, for the same form of the tree.
    """
    import optax

    mesh = jax.tree.leaves(shardings)[0].mesh
    return optax.tree_map_params(
        optimizer,
        lambda leaf, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda leaf: NamedSharding(mesh, PartitionSpec()),
    )


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Of tokens, targets and the like, [B, T]: rows over the axes that split batches, the sequence over `context`.

    Each over as many of them as divide it; `sharding.checks.check_divides` tells whether that is all.
    """
    check_mesh(mesh)
    return NamedSharding(mesh, activation_spec(("batch", "length"), shape, mesh))


def cache_shardings(mesh: Mesh, cache: Cache) -> Any:
    """The cache of `qwen2_jax.cache.empty_cache` with a `NamedSharding` for each array: rows, heads, and slots."""
    check_mesh(mesh)

    def sharding(x: jax.Array, axes: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(mesh, activation_spec(axes, x.shape, mesh, RULES["serve"]))

    def of_layer(x: jax.Array) -> NamedSharding:
        lead = ("layers",) * (x.ndim - 4)  # of stacked layers
        return sharding(x, (*lead, "batch", "kv_heads", "cache", "head_dim"))

    return cache.replace(  # type: ignore[attr-defined]
        layers=jax.tree.map(of_layer, cache.layers),
        segment_ids=sharding(cache.segment_ids, ("batch", "cache")),
        positions=sharding(cache.positions, ("batch", "cache")),
        length=NamedSharding(mesh, PartitionSpec()),
    )
