"""Which mesh axes each logical axis of the model is split over: tables and arithmetic, without JAX.

The model names its dims ("heads", "embed", ...); these tables alone know meshes. The programs (`sharding.rules`) and
the planner's formula read the same ones. `sizes` are devices by mesh axis, as `Mesh.shape` and `MeshSpec.sizes`; a mesh
may leave out any of its axes (`sharding.mesh.MESH_AXES`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

Sizes = Mapping[str, int]

ROW_AXES = ("data", "fsdp", "expert")
"""What batches are split over: outside of its experts, a MoE model takes `expert` for more data parallelism."""

WEIGHTS: Mapping[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "expert_mlp": "tensor",
    "embed": "fsdp",
    "norm": None,
    "head_dim": None,
    "router": None,
    "layers": None,
}
"""Wide dims over `tensor`, the model width over `fsdp`, experts over `expert`; gradients and optimizer state alike."""

_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "batch": ROW_AXES,
    "length": ("context",),
    "residual": ("context",),
    "cache": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": (),
    "head_dim": (),
    "layers": (),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """How a kind of run spreads over a mesh."""

    activations: Mapping[str, tuple[str, ...]]
    """Over as many of the axes, from the first, as divide the dim."""
    gather_weights: bool
    """Whether weights split over `fsdp` are put together, layer by layer, for the product. Otherwise the compiler may
    as well move the activations, which are smaller when there are few tokens."""


RULES = {
    # Between layers nothing mixes tokens, so what is kept for the backward pass is split over `tensor` as well.
    "train": Rules({**_ACTIVATIONS, "residual": ("context", "tensor")}, gather_weights=True),
    "serve": Rules(_ACTIVATIONS, gather_weights=False),
}


def axes_that_divide(size: int, axes: Sequence[str], sizes: Sizes) -> tuple[str, ...]:
    """As many of `axes`, from the first, as together divide a dim of `size`; those of one device are left out."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        if sizes.get(axis, 1) == 1:
            continue
        if size % math.prod(sizes[name] for name in (*taken, axis)):
            break
        taken = (*taken, axis)
    return taken


def weight_axes(axes: Sequence[str], shape: Sequence[int], sizes: Sizes) -> tuple[str | None, ...]:
    """The mesh axis that each dim of a weight of `shape`, with these logical axes, is stored over.

    Heads that do not divide are stored whole, and split along their width instead where that divides: computing pads or
    repeats them (`qwen2_jax.heads`). Any other dim is split whether it divides or not, for the caller to refuse.
    """
    found = [name if (name := WEIGHTS[axis]) and sizes.get(name, 1) > 1 else None for axis in axes]
    for dim, axis in enumerate(axes):
        if axis in ("heads", "kv_heads") and (name := found[dim]) and shape[dim] % sizes[name]:
            found[dim] = None
            if shape[dim + 1] % sizes[name] == 0:
                found[dim + 1] = name  # head_dim
    return tuple(found)


def activation_axes(
    axes: Sequence[str | None], shape: Sequence[int], sizes: Sizes, rules: Rules
) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that each dim of an activation of `shape` with these logical axes is split over, where it divides.

    For the logical axes of activations see `qwen2_jax.placement`.
    """
    return tuple(
        axes_that_divide(size, rules.activations[axis] if axis else (), sizes)
        for size, axis in zip(shape, axes, strict=True)
    )
