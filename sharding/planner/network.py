"""Which links each axis of a mesh has, and how long collectives take on them at best."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from sharding.mesh import MESH_AXES, MeshSpec, across_slices
from sharding.planner.chips import Topology

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclasses.dataclass(frozen=True)
class Lane:
    """A ring, line or switch among devices of one mesh axis: along one dim of a torus, or in a node."""

    devices: int
    bandwidth: float
    """Bytes per second that each device can receive over it."""
    hops: float
    """How many devices a message between any two passes on average, in units of what an all-gather needs."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What the devices of one mesh axis have between them."""

    lanes: tuple[Lane, ...]
    """Within a slice; a collective uses all at once."""
    slices: int
    """Parts of the axis that are in different slices."""
    across: float
    """Bytes per second and device between slices."""

    @property
    def inside(self) -> int:
        """Devices of the axis in one slice."""
        return math.prod(lane.devices for lane in self.lanes)

    @property
    def devices(self) -> int:
        return self.inside * self.slices


class Traffic(NamedTuple):
    """What one device receives over one mesh axis."""

    inside: float = 0.0
    """Bytes over the links of a slice."""
    across: float = 0.0
    """Bytes between slices."""
    inside_seconds: float = 0.0
    across_seconds: float = 0.0

    def plus(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


def networks(topology: Topology, mesh: MeshSpec) -> Mapping[str, Network]:
    """For each axis of the mesh.

    Devices are laid out as `sharding.mesh.make_mesh` does: over slices `data` goes first, then `fsdp`; within one, axes
    take dims of the torus from `tensor` on, whole ones if they can.
    """
    outer = dict(zip(MESH_AXES, across_slices(mesh, topology.slices), strict=True))
    inner = {axis: size // outer[axis] for axis, size in mesh.sizes.items()}
    chip = topology.chip
    if chip.dims:
        lanes = _on_torus(topology, inner)
    else:
        lanes = {axis: (Lane(size, chip.link_bandwidth, 1.0),) if size > 1 else () for axis, size in inner.items()}
    return {axis: Network(lanes[axis], outer[axis], chip.network_bandwidth) for axis in MESH_AXES}


def _on_torus(topology: Topology, sizes: Mapping[str, int]) -> dict[str, tuple[Lane, ...]]:
    link = topology.chip.link_bandwidth
    taken = [1] * len(topology.shape)
    lanes: dict[str, tuple[Lane, ...]] = {}
    for axis, parts in assign(topology.shape, [sizes[axis] for axis in MESH_AXES]).items():
        found = []
        for dim, (part, size, wraps) in enumerate(zip(parts, topology.shape, topology.wraps, strict=True)):
            if part > 1:
                # Both directions of a ring; one of a line. Parts that lie further apart share the links between.
                ring = 2 if part == size and wraps else 1
                found.append(Lane(part, ring * link / taken[dim], part * part / (4 * (part - 1))))
            taken[dim] *= part
        lanes[MESH_AXES[axis]] = tuple(found)
    return lanes


def assign(shape: Sequence[int], sizes: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """How many devices along each dim of a torus each mesh axis takes; from the last axis to the first.

    The choices of `jax.experimental.mesh_utils.create_device_mesh` with axes that may be split: whole dims rather than
    parts, and more of them.
    """
    left = list(shape)
    result = {}
    for axis in reversed(range(len(sizes))):
        result[axis] = max(_factorings(left, sizes[axis]), key=lambda parts: _preference(parts, shape, left))
        left = [rest // part for rest, part in zip(left, result[axis], strict=True)]
    return result


def _factorings(left: Sequence[int], size: int) -> Iterable[tuple[int, ...]]:
    choices = [[part for part in range(1, rest + 1) if rest % part == 0 and size % part == 0] for rest in left]
    return (parts for parts in itertools.product(*choices) if math.prod(parts) == size)


def _preference(parts: tuple[int, ...], shape: Sequence[int], left: Sequence[int]) -> tuple:
    whole = [part for part, size in zip(parts, shape, strict=True) if part == size]
    begun = [part for part, size, rest in zip(parts, shape, left, strict=True) if rest < size]
    return math.prod(whole), len([part for part in whole if part > 1]), math.prod(begun), parts


def collective(kind: Kind, size: float, network: Network) -> Traffic:
    """One collective over one axis.

    Args:
      kind: an all-reduce is a reduce-scatter and an all-gather.
      size: bytes of the larger side on each device: what it has after a gather, or before a reduction or exchange.

    Returns:
      What each device receives, and how long that takes at best: over rings in both directions, first between slices
      (so that each device's part crosses once), then within them.
    """
    if kind == "all-reduce":
        return collective("reduce-scatter", 2 * size, network)
    inside, slices = network.inside, network.slices
    across = size * (slices - 1) / slices / (1 if kind == "all-to-all" else inside)
    within = size * (inside - 1) / inside
    if kind == "all-to-all":
        seconds = max(
            (size * (lane.devices - 1) / lane.devices * lane.hops / lane.bandwidth for lane in network.lanes),
            default=0.0,
        )
    else:
        seconds = within / sum(lane.bandwidth for lane in network.lanes) if within else 0.0
    return Traffic(within, across, seconds, across / network.across)
