"""The objective on rows that are not trained on: the same ones every time."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import Params
from train.data.batches import Batches
from train.objective import Objective, Step


class Validation:
    """Compiled when it is first called."""

    def __init__(self, config: Qwen2Config, objective: Objective, how: Step, batches: Batches, count: int):
        """
        Args:
          how: as in training, but for micro-batches: there are none.
          batches: of which the first `count` are taken.
        """
        assert how.accumulate == 1 and count > 0
        self._batches, self._count = batches, count

        def evaluate(params: Params, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            weight = objective.weight(batch)
            loss, sums = objective(config, params, batch, how, jnp.where(weight > 0, weight, 1))
            return weight, {"loss": loss} | objective.metrics(sums)

        # Without it the compiler might leave them on some of a mesh's devices, where not every process can read them.
        everywhere = None if how.mesh is None else NamedSharding(how.mesh, PartitionSpec())
        self._evaluate = jax.jit(evaluate, out_shardings=everywhere)

    def __call__(self, params: Params) -> dict[str, float]:
        """The loss and the objective's metrics, over all batches together: means by weight, and sums of what counts."""
        with self._batches.stream() as stream:
            # Waits for each: XLA on CPU mixes up the collectives of too many programs under way.
            of_batches = [
                jax.device_get(self._evaluate(params, batch)) for _, batch in itertools.islice(stream, self._count)
            ]
        weights, records = zip(*of_batches, strict=True)
        total = sum(map(float, weights)) or 1.0

        def over_all(name: str) -> float:
            values = [record[name] for record in records]
            if jnp.issubdtype(values[0].dtype, jnp.integer):
                return sum(map(int, values))
            return sum(float(value * weight) for value, weight in zip(values, weights, strict=True)) / total

        return {name: over_all(name) for name in records[0]}
