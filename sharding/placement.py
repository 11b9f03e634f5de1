"""What the model asks about every activation and weight, answered for a mesh."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.placement import Placement, added_rows
from sharding.logical import RULES, Rules, activation_axes
from sharding.rules import activation_spec, weight_spec


@dataclasses.dataclass(frozen=True)
class MeshWeight:
    """A weight that is stored split over `fsdp` and put together for its product."""

    mesh: Mesh
    axes: tuple[str, ...]

    def gathered(self, weight: jax.Array) -> jax.Array:
        stored = weight_spec(self.axes, weight.shape, self.mesh)
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored))
        return jax.lax.with_sharding_constraint(weight, NamedSharding(self.mesh, whole))

    def scattered(self, gradient: jax.Array) -> jax.Array:
        stored = weight_spec(self.axes, gradient.shape, self.mesh)
        return jax.lax.with_sharding_constraint(gradient, NamedSharding(self.mesh, stored))

    def added_rows(self, shape: tuple[int, ...], rows: jax.Array, drows: jax.Array) -> jax.Array:
        """Each device adds up its part of the table, of the tokens of all devices along `fsdp` and `tensor`.

        Said so, because the compiler may have each device add up its own tokens in a whole table, to add those up.
        """
        stored = weight_spec(self.axes, shape, self.mesh)
        tokens = activation_axes(("batch", "residual"), rows.shape, self.mesh.shape, RULES["train"])
        split = [axis for names in tokens for axis in names]
        local = functools.partial(_added_rows, _part(shape, stored, self.mesh), stored, split)
        width = None if stored[1] in split else stored[1]
        specs = PartitionSpec(*tokens), PartitionSpec(*tokens, width)
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=stored, check_vma=False)(rows, drows)


def _part(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> tuple[int, ...]:
    return NamedSharding(mesh, spec).shard_shape(tuple(shape))


def _added_rows(part, stored, split, rows, drows):
    vocab, width = stored
    if width in split:
        rows = jax.lax.all_gather(rows, width, axis=0, tiled=True)
        drows = jax.lax.all_to_all(drows, width, split_axis=2, concat_axis=0, tiled=True)
    if vocab in split:
        rows, drows = (jax.lax.all_gather(x, vocab, axis=1, tiled=True) for x in (rows, drows))
    if vocab is not None:
        rows = rows - jax.lax.axis_index(vocab) * part[0]
    added = added_rows(part, rows, drows)
    others = tuple(axis for axis in split if axis not in stored)
    return jax.lax.psum(added, others) if others else added


@dataclasses.dataclass(frozen=True)
class MeshPlacement(Placement):
    """Splits activations and weights over a mesh by rules."""

    mesh: Mesh
    rules: Rules

    def activation(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        spec = activation_spec(axes, x.shape, self.mesh, self.rules)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def heads_together(self, weight: jax.Array, axes: Sequence[str]) -> jax.Array:
        stored = weight_spec(axes, weight.shape, self.mesh)
        if "head_dim" not in axes or stored[axes.index("head_dim")] is None:
            return weight
        return _together(NamedSharding(self.mesh, stored), weight)

    def weight(self, axes: Sequence[str]) -> MeshWeight | None:
        return MeshWeight(self.mesh, tuple(axes)) if self.rules.gather_weights else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _together(stored: NamedSharding, weight: jax.Array) -> jax.Array:
    """A weight that is stored split over `tensor`, gathered over that axis only; its gradient is stored again.

    Said so, because the compiler would go from parts of each head's width to heads by gathering over `fsdp` as well.
    """
    whole = PartitionSpec(*(None if axis == "tensor" else axis for axis in stored.spec))
    return jax.lax.with_sharding_constraint(weight, NamedSharding(stored.mesh, whole))


def _together_fwd(stored, weight):
    return _together(stored, weight), None


def _together_bwd(stored, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_together.defvjp(_together_fwd, _together_bwd)
