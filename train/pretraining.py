"""Pre-training: the next token of packed documents."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import Output, Params, Qwen2, head_of
from qwen2_jax.moe import RouterStatistics, router_metrics
from train.loss import IGNORE, loss_sums, split_over
from train.objective import Step


class Batch(NamedTuple):
    """Each [B, T] int32, or [A, B, T]; [T] of a row of data. Also of their shapes."""

    tokens: Any
    targets: Any
    """The token to predict at each place, or IGNORE."""
    segment_ids: Any = None
    """By default every row is one document."""
    positions: Any = None
    """By default each document counts from 0."""


class Sums(NamedTuple):
    """Of micro-batches, to be added up."""

    cross_entropy: jax.Array
    """Share of the mean over targets, in nats."""
    z_loss: jax.Array
    """Share of the mean over targets of logsumexp(logits)^2, before its coefficient."""
    aux_loss: jax.Array
    """Weighted share of the load-balancing loss, before its coefficient."""
    targets: jax.Array
    """How many count, int32."""
    router: RouterStatistics | None


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Mean next-token cross entropy, with config.router_aux_loss_coef times the load-balancing loss if MoE.

    However a batch is cut into micro-batches and rows, cross entropy and z-loss are means over all of its targets. The
    load-balancing loss is a product of means and does not add up: the whole batch's is taken to be the mean of those of
    the micro-batches, weighted by their targets.
    """

    z_loss: float = 0.0
    """Coefficient of the mean of logsumexp(logits)^2, which keeps logits from drifting; 1e-4 is usual (PaLM, arXiv
    2204.02311, section 5)."""

    def __post_init__(self):
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss is a coefficient of 0 or more, got {self.z_loss}; 0 leaves it out")

    def weight(self, batch: Batch) -> jax.Array:
        return (batch.targets != IGNORE).sum(dtype=jnp.int32).astype(jnp.float32)

    def __call__(
        self, config: Qwen2Config, params: Params, batch: Batch, how: Step, weight: jax.Array
    ) -> tuple[jax.Array, Sums]:
        model = Qwen2(config, stacked=True, dtype=how.dtype, remat=how.remat, options=how.options)
        output = model.apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids, logits="none")
        assert isinstance(output, Output)
        with jax.named_scope("loss"):
            split = None if how.mesh is None else split_over(config, how.mesh, batch.targets.shape)
            head = head_of(config, params)
            total, cross_entropy, z = loss_sums(output.hidden, head, batch.targets, how.chunk, split, self.z_loss)
            aux_loss = output.aux_loss * self.weight(batch) / weight
            share = total / weight
            if config.is_moe:
                share += config.router_aux_loss_coef * aux_loss
        targets = (batch.targets != IGNORE).sum(dtype=jnp.int32)
        return share, Sums(cross_entropy / weight, z / weight, aux_loss, targets, output.router)

    def metrics(self, sums: Sums) -> dict[str, jax.Array]:
        """cross_entropy, aux_loss and targets; z_loss if it has a coefficient; `router_metrics` of a MoE."""
        metrics = {"cross_entropy": sums.cross_entropy, "aux_loss": sums.aux_loss, "targets": sums.targets}
        if self.z_loss:
            metrics["z_loss"] = sums.z_loss
        return metrics | ({} if sums.router is None else router_metrics(sums.router))
