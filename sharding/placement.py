"""What the model asks about every activation and weight, answered for a mesh."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.placement import Placement
from sharding.logical import Rules
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
