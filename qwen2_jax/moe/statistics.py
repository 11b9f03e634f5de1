"""What the routers did: sums for each layer, the load-balancing loss, and scalars for a training log."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from qwen2_jax.moe.routing import Routing
from qwen2_jax.projection import align


class RouterStatistics(NamedTuple):
    """float32 sums over real tokens. The leading axes, if any, are layers: [L] MoE layers in a model's output."""

    choices: jax.Array
    """[..., E]: how often the router wanted each expert, whether or not a capacity then dropped the choice."""
    probability: jax.Array
    """[..., E]: sum of each expert's probability."""
    rows: jax.Array
    """[...]: real tokens."""
    entropy: jax.Array
    """[...]: sum of the entropies of the tokens' distributions over experts, in nats; no gradient flows through it."""
    dropped: jax.Array
    """[...]: choices that a capacity dropped."""


def router_statistics(routing: Routing, real: jax.Array, dropped: jax.Array | int = 0) -> RouterStatistics:
    """Sums for one layer.

    Args:
      routing: of tokens [...], as the router wanted it, before any capacity.
      real: [...] bool, the tokens that count.
      dropped: how many choices of real tokens a capacity dropped.
    """
    tokens = tuple(range(real.ndim))
    choice = routing.experts[..., None]
    # Compared and summed in one pass: no array of tokens times experts, and no scatter, which is slow on TPU.
    chosen = choice == align(jnp.arange(routing.probabilities.shape[-1], dtype=jnp.int32), choice)
    chosen &= real[..., None, None]
    probabilities = jnp.where(real[..., None], routing.probabilities, 0.0)
    return RouterStatistics(
        choices=chosen.sum(axis=(*tokens, real.ndim), dtype=jnp.int32).astype(jnp.float32),
        probability=probabilities.sum(axis=tokens),
        rows=real.sum(dtype=jnp.int32).astype(jnp.float32),
        entropy=entr(jax.lax.stop_gradient(probabilities)).sum(),  # its derivative at 0 is infinite
        dropped=jnp.asarray(dropped).astype(jnp.float32),
    )


def load_balancing_loss(statistics: RouterStatistics) -> jax.Array:
    """E * sum_e f_e P_e over the rows of all layers together; top_k when perfectly balanced, 0 for no rows.

    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6, with every choice of a token counted.
    """
    layers = tuple(range(statistics.rows.ndim))
    rows = jnp.maximum(statistics.rows.sum(), 1.0)
    choices, probability = statistics.choices.sum(axis=layers), statistics.probability.sum(axis=layers)
    return choices.shape[0] * jnp.sum((choices / rows) * (probability / rows))


def router_metrics(statistics: RouterStatistics) -> dict[str, jax.Array]:
    """float32 scalars for a training log, all finite, even for no rows.

    - moe/load_balancing_loss: as `load_balancing_loss`, before its coefficient.
    - moe/load_max_over_mean: choices of the busiest expert over the mean, in the worst layer; 1 is perfect balance.
    - moe/load_min_over_mean: likewise of the idlest expert.
    - moe/unused_experts: fraction of the experts of all layers that no token chose.
    - moe/router_entropy: mean over tokens and layers, in nats; log(E) for a router that has learned nothing.
    - moe/dropped_fraction: of all choices, those that a capacity dropped.
    """
    choices = statistics.choices.reshape(-1, statistics.choices.shape[-1])
    load = choices * choices.shape[-1] / jnp.maximum(choices.sum(axis=-1, keepdims=True), 1.0)
    return {
        "moe/load_balancing_loss": load_balancing_loss(statistics),
        "moe/load_max_over_mean": load.max(),
        "moe/load_min_over_mean": load.min(),
        "moe/unused_experts": (choices == 0).mean(dtype=jnp.float32),
        "moe/router_entropy": statistics.entropy.sum() / jnp.maximum(statistics.rows.sum(), 1.0),
        "moe/dropped_fraction": statistics.dropped.sum() / jnp.maximum(choices.sum(), 1.0),
    }
