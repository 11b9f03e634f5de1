"""How much of what the chips could do a run does, by both conventions that are in use, and how much memory it takes."""

import dataclasses
from collections.abc import Sequence

import jax

from qwen2_jax.config import Qwen2Config
from sharding.mesh import MeshSpec
from sharding.planner.chips import CHIPS, Topology, chip_of
from sharding.planner.request import Request
from sharding.planner.spread import Spread
from sharding.planner.work import flops


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations that training needs, and what the devices can do; a multiply and an add are two."""

    products: float
    """Per token, with weights: 6N, N the parameters that one token is multiplied with (of experts, the chosen ones)."""
    attention: float
    """Per token, scores and weighted sums of causal attention over whole rows; packed documents are not told apart."""
    peak: float | None
    """Per second, of all devices together at bfloat16; None where it is not known, as on CPUs."""

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization, a fraction of 1: products with weights and attention's."""
        return None if self.peak is None else tokens_per_second * (self.products + self.attention) / self.peak

    def mfu_6n(self, tokens_per_second: float) -> float | None:
        """The same by 6N alone, as papers that leave attention out count."""
        return None if self.peak is None else tokens_per_second * self.products / self.peak


def work(config: Qwen2Config, seq: int, devices: Sequence[jax.Device]) -> Work:
    """Of training on rows of `seq` tokens, by the planner's formulas.

    Args:
      devices: all of the run, of one kind.
    """
    chip = chip_of(devices[0].device_kind)
    # What the mathematics needs depends neither on the chip nor on the mesh.
    place = Topology(chip or CHIPS["H100"], (1,))
    need = flops(Spread(Request("", config, place, MeshSpec(), "train", batch=1, seq=seq)))
    peak = None if chip is None else chip.flops * len(devices)
    return Work(need.products / seq, need.attention / seq, peak)


def peak_memory(devices: Sequence[jax.Device] | None = None) -> int | None:
    """The most bytes that one of this process' devices had in use so far; None where devices do not tell, as CPUs.

    Args:
      devices: by default `jax.local_devices()`.
    """
    statistics = [device.memory_stats() or {} for device in (jax.local_devices() if devices is None else devices)]
    return max((known["peak_bytes_in_use"] for known in statistics if "peak_bytes_in_use" in known), default=None)
