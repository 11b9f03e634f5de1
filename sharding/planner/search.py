"""Every way to spread a run over its chips that the formula says will fit, best first."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from sharding.mesh import MESH_AXES, MeshSpec
from sharding.planner.estimate import Estimate, estimate
from sharding.planner.request import REMATS, Remat, Request, checked

MARGIN = 0.1
"""Share of a device's memory that a candidate must leave: the formula may be off by so much, and a heap has gaps."""
_SAME = 0.01
"""Bounds that differ by less than this share are as good as equal; then what is left without overlap decides."""


def search(
    request: Request,
    meshes: Sequence[MeshSpec] | None = None,
    batches: Sequence[int] | None = None,
    remats: Sequence[Remat] | None = None,
) -> list[Estimate]:
    """Estimates of all combinations that divide, and fit with a margin, by tokens per second, highest first.

    Args:
      request: what stays the same; its mesh, batch and remat are those of no candidate.
      meshes: to try; None for all whose axes multiply to the devices.
      batches: to try; None for 1, 2, 4, ... rows per group of devices that share rows.
      remats: to try; None for all when training.

    Raises:
      ValueError: if there are none: because none fits, or none divides; then with what is least wrong.
    """
    found, refused, smallest = [], [], None
    for mesh in meshes if meshes is not None else all_meshes(request):
        policies = remats if remats is not None else REMATS if request.training else REMATS[:1]
        for remat in policies:
            for batch in batches if batches is not None else _batches(mesh):
                candidate = dataclasses.replace(request, mesh=mesh, batch=batch, remat=remat)
                try:
                    result = estimate(checked(candidate))
                except ValueError as error:  # it does not divide
                    refused.append(str(error))
                    continue
                smallest = min(result, smallest or result, key=lambda result: result.memory.total)
                if result.headroom >= MARGIN * request.topology.chip.memory:
                    found.append(result)
                elif batches is None:
                    break
    if smallest is None:
        raise ValueError(min(refused, key=len))  # each names all that is wrong with it
    if not found:
        chip, least = request.topology.chip, smallest.request
        how = f", remat {least.remat}" if least.training else ""
        fewer = "" if batches is None else "fewer (--batch) or "
        raise ValueError(
            f"nothing that divides fits {request.topology} with a tenth to spare: the least, mesh {least.mesh} with "
            f"{least.batch} rows{how}, takes {smallest.memory.total / 1e9:.1f} GB of a {chip.name}'s "
            f"{chip.memory / 1e9:.1f}; use more chips, or {fewer}shorter rows (--seq)"
        )
    return sorted(found, key=_rank, reverse=True)


def all_meshes(request: Request) -> Iterator[MeshSpec]:
    """Every mesh of so many devices; `expert` only for models that have experts."""
    devices = request.topology.devices
    axes = [axis for axis in MESH_AXES if axis != "expert" or request.config.is_moe]
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for chosen in itertools.product(sizes, repeat=len(axes) - 1):
        if devices % math.prod(chosen) == 0:
            yield MeshSpec(**dict(zip(axes, (*chosen, devices // math.prod(chosen)), strict=True)))


def _batches(mesh: MeshSpec) -> Iterator[int]:
    rows = mesh.data * mesh.fsdp * mesh.expert
    return (rows << power for power in range(11))


def _rank(result: Estimate) -> tuple[int, float]:
    return round(math.log(result.tokens_per_second) / _SAME), result.tokens / result.serial
