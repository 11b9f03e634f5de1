"""The block that the benchmark of the mixture of experts measures: its shape, its numbers, and what each side does."""

import dataclasses
import json
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """The proportions of Qwen1.5-MoE-A2.7B (width 2048, 60 experts of 1408, 4 chosen, shared expert 5632), halved."""

    batch: int = 8
    length: int = 128
    width: int = 1024
    experts: int = 60
    choices: int = 4
    inner: int = 704
    shared_inner: int = 2816

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def products(self) -> int:
        """FLOPs of the matrix products of one forward pass, of chosen experts only."""
        units = self.choices * self.inner + self.shared_inner
        return 2 * self.tokens * self.width * (3 * units + self.experts + 1)


def shape_from(text: str) -> Shape:
    """The inverse of `json.dumps(dataclasses.asdict(shape))`."""
    return Shape(**json.loads(text))


def arrays(shape: Shape) -> dict[str, np.ndarray]:
    """float32 tokens, the gradient of the result, and weights, by their names in this project."""
    rng = np.random.default_rng(0)

    def normal(stddev: float, *dims: int) -> np.ndarray:
        return rng.standard_normal(dims, np.float32) * np.float32(stddev)

    width, inner, shared = shape.width, shape.inner, shape.shared_inner
    stddev = width**-0.5
    return {
        "x": normal(1.0, shape.batch, shape.length, width),
        "dout": normal(1.0, shape.batch, shape.length, width),
        "router": normal(stddev, shape.experts, width),
        "gate": normal(stddev, shape.experts, inner, width),
        "up": normal(stddev, shape.experts, inner, width),
        "down": normal(inner**-0.5, shape.experts, width, inner),
        "shared_gate": normal(stddev, shared, width),
        "shared_up": normal(stddev, shared, width),
        "shared_down": normal(shared**-0.5, width, shared),
        "shared_expert_gate": normal(stddev, width),
    }


def summary(out: np.ndarray, gradient: np.ndarray | None) -> dict[str, Any]:
    """What of the results [B, T, D] is compared: some numbers of each."""
    parts = [out] if gradient is None else [out, gradient]
    return {"numbers": [part[::3, ::17, ::31].astype(np.float32).ravel().tolist() for part in parts]}


class Side:
    """An engine of `benchmarks.worker.serve`: one implementation of the block."""

    def device_memory(self) -> None:
        return None

    def answer(self, task: str, **arguments: Any) -> dict[str, Any]:
        return self.prepare(**arguments) if task == "prepare" else self.run(task == "forward and backward")

    def prepare(self, shape: str, dtype: str, side: str, mesh: str) -> dict[str, Any]:
        """Loads the block with the numbers of `arrays`, and says where and by what it runs."""
        raise NotImplementedError

    def run(self, backward: bool) -> dict[str, Any]:
        """Runs it forward, or also backward; returns the `summary` of the results."""
        raise NotImplementedError
