"""The training objective of pre-training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import Output

IGNORE = -100
"""A target that does not count, as in PyTorch."""


class Loss(NamedTuple):
    total: jax.Array
    """Cross entropy plus the weighted load-balancing loss, a scalar float32."""
    cross_entropy: jax.Array
    """Mean over the targets that count, in nats."""
    targets: jax.Array
    """How many count."""


def next_token_targets(tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """[B, T] int32: the token after each of tokens [B, T]; IGNORE at the end of rows and documents, and on padding."""
    targets = jnp.roll(tokens, -1, axis=1).at[:, -1].set(IGNORE)
    if segment_ids is None:
        return targets
    same = (jnp.roll(segment_ids, -1, axis=1) == segment_ids) & (segment_ids != 0)
    return jnp.where(same, targets, IGNORE)


def next_token_loss(config: Qwen2Config, output: Output, targets: jax.Array) -> Loss:
    """Mean next-token cross entropy in float32, plus router_aux_loss_coef times the load-balancing loss if MoE.

    Args:
      output: of the model, with all logits [B, T, V].
      targets: [B, T] int32 ids, or IGNORE.

    Source: load-balancing term as in transformers' Qwen2MoeForCausalLM with output_router_logits.
    """
    assert output.logits is not None
    counted = targets != IGNORE
    log_probabilities = jax.nn.log_softmax(output.logits.astype(jnp.float32), axis=-1)
    ids = jnp.where(counted, targets, 0)
    chosen = jnp.take_along_axis(log_probabilities, ids[..., None], axis=-1)[..., 0]
    count = counted.sum()
    cross_entropy = -jnp.where(counted, chosen, 0.0).sum() / jnp.maximum(count, 1).astype(jnp.float32)
    total = cross_entropy
    if config.is_moe:
        total += config.router_aux_loss_coef * output.aux_loss
    return Loss(total, cross_entropy, count)
