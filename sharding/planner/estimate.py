"""The answer by formula: does it fit, how long does a step take at least, and what limits it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sharding.planner.memory import Memory, host_traffic, memory
from sharding.planner.network import Traffic, networks
from sharding.planner.request import Request
from sharding.planner.spread import Spread
from sharding.planner.traffic import Transfer, total, transfers
from sharding.planner.work import Flops, flops, memory_traffic


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one request costs. Times are bounds: no step can be faster, and real ones are slower."""

    request: Request
    memory: Memory
    flops: Flops
    memory_traffic: Mapping[str, float]
    """Bytes that one device reads and writes, by what they are."""
    host_traffic: int
    """Bytes between one device and its host."""
    transfers: tuple[Transfer, ...]
    traffic: Mapping[str, Traffic]
    """By mesh axis."""

    @property
    def headroom(self) -> int:
        """Bytes of a device's memory that are left; negative if it does not fit."""
        return self.request.topology.chip.memory - self.memory.total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step, by what they are spent on at full speed. Axes of the mesh use different links."""
        chip = self.request.topology.chip
        return {
            "compute": self.flops.total / self.request.topology.devices / chip.flops,
            "memory": sum(self.memory_traffic.values()) / chip.memory_bandwidth,
            "links": max(traffic.inside_seconds for traffic in self.traffic.values()),
            "network": sum(traffic.across_seconds for traffic in self.traffic.values()),
            "host": self.host_traffic / (2 * chip.host_bandwidth),  # out and in at once
        }

    @property
    def bound(self) -> float:
        """Seconds of a step in which everything overlaps with the slowest."""
        return max(self.seconds.values())

    @property
    def serial(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        links = sum(traffic.inside_seconds for traffic in self.traffic.values())
        return sum(self.seconds.values()) - self.seconds["links"] + links

    @property
    def limit(self) -> str:
        """What the bound is spent on."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def tokens(self) -> int:
        """That a step takes in (when decoding, puts out), on all devices."""
        return self.request.batch * self.request.queries

    @property
    def tokens_per_second(self) -> float:
        """At most, on all devices."""
        return self.tokens / self.bound

    @property
    def mfu(self) -> float:
        """At most: the model's operations, by what the chips could do in the time."""
        topology = self.request.topology
        return self.flops.model / (self.bound * topology.devices * topology.chip.flops)


def estimate(request: Request) -> Estimate:
    """Of a request that `checked` has passed."""
    spread = Spread(request)
    moves = tuple(transfers(spread))
    traffic = total(moves, networks(request.topology, request.mesh))
    work = flops(spread), memory_traffic(spread), host_traffic(spread)
    return Estimate(request, memory(spread), *work, moves, traffic)


def as_json(result: Estimate) -> dict[str, Any]:
    """Everything in it, as numbers and text; bytes, seconds and operations."""
    request, chip = result.request, result.request.topology.chip
    return {
        "model": request.model,
        "topology": request.topology.name,
        "slices": request.topology.slices,
        "devices": request.topology.devices,
        "mesh": request.mesh.sizes,
        "task": request.task,
        "batch": request.batch,
        "seq": request.seq,
        "remat": request.remat if request.training else None,
        "optimizer": request.optimizer if request.training else None,
        "memory": {
            **result.memory._asdict(),
            "arguments": result.memory.arguments,
            "temporaries": result.memory.temporaries,
            "total": result.memory.total,
            "capacity": chip.memory,
        },
        "fits": result.fits,
        "headroom": result.headroom,
        "flops": {**dataclasses.asdict(result.flops), "model": result.flops.model, "total": result.flops.total},
        "memory_traffic": dict(result.memory_traffic),
        "host_traffic": result.host_traffic,
        "traffic": {axis: traffic._asdict() for axis, traffic in result.traffic.items()},
        "seconds": {**result.seconds, "bound": result.bound, "serial": result.serial},
        "limit": result.limit,
        "tokens_per_second": result.tokens_per_second,
        "mfu": result.mfu,
    }
