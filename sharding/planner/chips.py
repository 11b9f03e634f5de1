"""What chips and the networks between them can do at most."""

import dataclasses
import difflib
import math
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them. Bandwidths are peak bytes per second in one direction."""

    name: str
    kind: Literal["tpu", "gpu"]
    flops: float
    """Dense bfloat16 floating-point operations per second."""
    memory: int
    """Bytes that a program may use."""
    memory_bandwidth: float
    link_bandwidth: float
    """Of one link: on a TPU to one neighbour on the torus; on a GPU to the switch."""
    network_bandwidth: float
    """Between slices (on GPUs: between nodes), per chip."""
    host_bandwidth: float
    """Between a chip and the memory of its host."""
    dims: int
    """Of the torus; 0 where a switch connects the chips of a node."""


# Memory of TPUs: what libtpu 0.0.41 leaves to a program (capacity less what its compiler calls "reserved").
# FLOP/s, memory bandwidth and, for v5p, network: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.
# Links, network per chip and PCIe: "How to Scale Your Model" (jax-ml.github.io/scaling-book), part 2, TPU specs.
# GPUs: NVIDIA's H100 SXM and H200 SXM data sheets (NVLink 900 GB/s and PCIe 128 GB/s, both directions together), one
# 400 Gb/s adapter per GPU as in DGX H100; memory as the driver reports it, less what CUDA's context takes.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, int(30.75 * GIB), 1.2e12, 4.5e10, 6.25e9, 1.6e10, dims=3),
        Chip("v5e", "tpu", 197e12, int(15.75 * GIB), 0.819e12, 4.5e10, 3.125e9, 1.6e10, dims=2),
        Chip("v5p", "tpu", 459e12, int(95.74 * GIB), 2.765e12, 9e10, 6.25e9, 1.6e10, dims=3),
        Chip("v6e", "tpu", 918e12, int(31.25 * GIB), 1.638e12, 9e10, 12.5e9, 3.2e10, dims=2),
        Chip("H100", "gpu", 989e12, 78 * GIB, 3.35e12, 4.5e11, 5e10, 6.4e10, dims=0),
        Chip("H200", "gpu", 989e12, 139 * GIB, 4.8e12, 4.5e11, 5e10, 6.4e10, dims=0),
    )
}

CHIP_OF_KIND = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}
"""Names in the table by `jax.Device.device_kind`. H100 and H200 as PCIe or NVL cards, and parts of a card
(MIG), have names of their own, and do less than the table says."""

_NODE = 8
"""GPUs behind one NVLink switch."""
_RING = 16
"""Chips on a dim of a 2D torus from which its ends are connected."""
_CUBE = 4
"""Of 3D tori: cubes of so many chips on a side are connected by optical switches, to tori of whole cubes."""
# docs.cloud.google.com/tpu/docs: the tables of each chip's configurations.
_SLICES: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)),
}
"""Shapes of slices, dims sorted, from the smallest; 3D ones grow on by doubling a dim."""
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256}
"""Chips of the largest slice on offer."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None if the table has no such one."""
    name = CHIP_OF_KIND.get(device_kind)
    return None if name is None else CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected.

    A slice is what fast links connect: chips of a TPU slice, or the GPUs of a node. Slices talk over the data-center
    network.
    """

    chip: Chip
    shape: tuple[int, ...]
    """Chips of one slice along each dim of its torus; (GPUs of a node,) for GPUs."""
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As `parse_topology` reads it, slices apart."""
        if self.chip.kind == "gpu":
            return f"{self.chip.name}:{self.devices}"
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each dim of a torus, whether its ends are connected."""
        if self.chip.dims == 3:
            return (all(size % _CUBE == 0 for size in self.shape),) * 3
        return tuple(size == _RING for size in self.shape)

    def __str__(self) -> str:
        if self.chip.kind == "gpu" or self.slices == 1:
            return self.name
        return f"{self.slices} slices of {self.name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads `v5p:4x4x8` (chips along each dim of a TPU slice, as libtpu calls it) or `H100:16` (GPUs).

    Args:
      text: chip, colon, shape.
      slices: how many such TPU slices there are. GPUs come in nodes of 8, which the number of GPUs tells.

    Raises:
      ValueError: for a chip that is not in the table, or a shape that it does not come in.
    """
    name, colon, size = text.partition(":")
    chip = {name.lower(): chip for name, chip in CHIPS.items()}.get(name.strip().lower())
    if chip is None:
        near = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.5)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown chip {name!r} in topology {text!r}; known are {', '.join(CHIPS)}{meant}")
    if slices < 1:
        raise ValueError(f"slices must be 1 or more, got {slices}")
    example = f"{chip.name}:8" if chip.kind == "gpu" else f"{chip.name}:{'4x4x4' if chip.dims == 3 else '16x16'}"
    sizes = size.strip().lower().split("x")
    if not colon or not all(part.isdecimal() and len(part) < 6 and int(part) > 0 for part in sizes):
        raise ValueError(f"topology {text!r} is not a chip and its number, an example is {example}")
    shape = tuple(int(part) for part in sizes)
    if chip.kind == "gpu":
        return _nodes(chip, shape, slices, example)
    if len(shape) != chip.dims:
        raise ValueError(
            f"{chip.name} is a {chip.dims}D torus, got {len(shape)} dims in {text!r}; an example is {example}"
        )
    _check_slice(chip, shape, text)
    return Topology(chip, shape, slices)


def _nodes(chip: Chip, shape: tuple[int, ...], slices: int, example: str) -> Topology:
    (count,) = shape if len(shape) == 1 else (0,)
    if slices != 1:
        raise ValueError(f"slices are for TPUs; for GPUs give their number, {chip.name}:{max(count, _NODE) * slices}")
    if count > _NODE and count % _NODE == 0:
        return Topology(chip, (_NODE,), count // _NODE)
    if count not in (1, 2, 4, _NODE):
        raise ValueError(f"{chip.name} comes as 1, 2, 4 or {_NODE} GPUs, or nodes of {_NODE}; an example is {example}")
    return Topology(chip, (count,))


def _check_slice(chip: Chip, shape: tuple[int, ...], text: str) -> None:
    """Refuses what Google does not offer."""
    if math.prod(shape) > _LARGEST[chip.name]:
        raise ValueError(
            f"topology {text!r} has {math.prod(shape)} chips, a slice of {chip.name} {_LARGEST[chip.name]} at most; "
            "use several slices (--slices)"
        )
    known = tuple(sorted(shape)) in _SLICES[chip.dims]
    if not known and not (chip.dims == 3 and all(size % _CUBE == 0 for size in shape)):
        offered = ", ".join("x".join(map(str, size)) for size in _SLICES[chip.dims])
        more = ", or dims that are all multiples of 4" if chip.dims == 3 else ""
        raise ValueError(f"topology {text!r}: {chip.name} comes as {offered}{more}")


def grown(place: Topology) -> Topology | None:
    """The next larger slice of the same chips, or as many more nodes of GPUs; None if there is none."""
    chip, shape = place.chip, tuple(sorted(place.shape))
    if chip.kind == "gpu":
        return dataclasses.replace(place, shape=(min(2 * shape[0], _NODE),), slices=place.slices << (shape[0] == _NODE))
    known = _SLICES[chip.dims]
    larger = known[known.index(shape) + 1] if shape in known[:-1] else tuple(sorted((2 * shape[0], *shape[1:])))
    if math.prod(larger) > _LARGEST[chip.name]:
        return None
    return dataclasses.replace(place, shape=larger)
