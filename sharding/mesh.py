"""Meshes from a short text: `data=2,fsdp=-1,tensor=4`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
"""From the slowest network to the fastest: `data` goes across slices, `tensor` between neighbours."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices each axis has; -1 for one of them stands for whatever is left.

    `data` splits the batch only; `fsdp` the batch, and weights, gradients and optimizer state; `tensor` heads, MLP and
    vocabulary; `expert` the batch, and experts; `context` the sequence.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        if wrong := [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]:
            raise ValueError(f"{', '.join(wrong)}: an axis of a mesh has 1 device or more, or -1 for all that are left")
        if (fills := [axis for axis, size in sizes.items() if size == -1])[1:]:
            raise ValueError(f"only one axis of a mesh can take what is left (-1), got {' and '.join(fills)}")

    @classmethod
    def parse(cls, text: str) -> "MeshSpec":
        """Reads `axis=size` separated by commas; axes that are not named have one device.

        Raises:
          ValueError: for anything else.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if axis not in MESH_AXES:
                raise ValueError(f"unknown mesh axis {axis!r} in {text!r}; known are {', '.join(MESH_AXES)}")
            if axis in sizes:
                raise ValueError(f"mesh axis {axis} stands twice in {text!r}")
            if not equals or not size.removeprefix("-").isdecimal() or len(size) > 9:
                raise ValueError(f"{part!r} in {text!r} is not an axis and its size; an example is data=2,fsdp=-1")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """By axis, in the order of MESH_AXES."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def devices(self) -> int:
        """The product of all axes."""
        return math.prod(self.sizes.values())

    def resolve(self, devices: int) -> "MeshSpec":
        """The same without -1, for so many devices.

        Raises:
          ValueError: if the axes do not multiply to them.
        """
        known = math.prod(size for size in self.sizes.values() if size != -1)
        fill = [axis for axis, size in self.sizes.items() if size == -1]
        if fill and devices % known == 0:
            return dataclasses.replace(self, **{fill[0]: devices // known})
        if fill or known != devices:
            rest = f" (and {fill[0]} cannot fill the rest)" if fill else "; -1 for one of them fills the rest"
            raise ValueError(f"mesh {self} is {known} devices, but there are {devices}{rest}")
        return self

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size != 1) or "data=1"


def make_mesh(spec: MeshSpec | str, devices: "Sequence[jax.Device] | None" = None) -> "jax.sharding.Mesh":
    """A mesh with all axes of MESH_AXES, over `devices` or all there are.

    Devices are ordered so that the axes follow the links between chips. Where there are several slices (or several
    groups of GPUs), `data`, then `fsdp`, goes across them.

    Raises:
      ValueError: if the axes do not multiply to the devices, or do not go around the slices.
    """
    import jax
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    devices = list(jax.devices() if devices is None else devices)
    spec = (MeshSpec.parse(spec) if isinstance(spec, str) else spec).resolve(len(devices))
    shape = tuple(spec.sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "cpu":
        grid = np.array(devices).reshape(shape)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = across_slices(spec, slices)
        inside = tuple(size // outer for size, outer in zip(shape, across, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def across_slices(spec: MeshSpec, slices: int) -> tuple[int, ...]:
    """How many of each axis's devices are in different slices: all of `data` that can be, then of `fsdp`.

    Raises:
      ValueError: if their product cannot be the number of slices.
    """
    data = math.gcd(spec.data, slices)
    if spec.fsdp % (slices // data):
        raise ValueError(
            f"mesh {spec} does not go around {slices} slices: data times fsdp must be a multiple of them, in this "
            f"order; use data={slices} or a multiple"
        )
    outer = {"data": data, "fsdp": slices // data}
    return tuple(outer.get(axis, 1) for axis in MESH_AXES)
