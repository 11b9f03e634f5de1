"""The router's decision: which experts each token goes to, and with what weight."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.moe.rows import group


class Routing(NamedTuple):
    """What the router decides for tokens with any leading axes, k choices each."""

    weights: jax.Array
    """[..., k] in the activations' dtype; they sum to less than 1 unless the model normalises them."""
    experts: jax.Array
    """[..., k] int32, distinct within a token; E, one past the last, is a choice of nobody, and its weight is 0."""
    probabilities: jax.Array
    """[..., E] float32, over all experts."""


def route(logits: jax.Array, top_k: int, normalise: bool) -> Routing:
    """Chooses top_k experts for each token of the router's logits [..., E].

    The softmax is taken over all experts, before the choice, in float32; the chosen probabilities are used as they are
    unless `normalise` (norm_topk_prob, false for Qwen2).

    Source: Qwen2 technical report, section 2.2.2, equations 1 and 2.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(probabilities, top_k)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(weights.astype(logits.dtype), experts, probabilities)


def keep(routing: Routing, kept: jax.Array) -> Routing:
    """Turns the choices where kept (bool, [..., k] or [..., 1]) is false into choices of nobody."""
    nobody = routing.probabilities.shape[-1]
    weights = jnp.where(kept, routing.weights, jnp.zeros_like(routing.weights))
    return routing._replace(weights=weights, experts=jnp.where(kept, routing.experts, nobody))


def with_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """Drops what exceeds an expert's capacity: ceil(capacity_factor * tokens * k / E), served in order of the tokens.

    Choices of nobody take no place. The probabilities stay: what the router wanted is not what it got.

    Source: Switch Transformers (arXiv 2101.03961), equation 3.
    """
    chosen, experts = routing.experts.ravel(), routing.probabilities.shape[-1]
    capacity = capacity_of(chosen.size, experts, capacity_factor)
    groups = group(chosen, experts)
    first = jnp.cumsum(groups.sizes) - groups.sizes
    before = groups.place - first.at[chosen].get(mode="fill", fill_value=0)
    return keep(routing, (before < capacity).reshape(routing.experts.shape))


def capacity_of(choices: int, experts: int, capacity_factor: float) -> int:
    """Rows that an expert serves of this many choices over all experts."""
    return math.ceil(capacity_factor * choices / experts)


def dropped_choices(wanted: Routing, kept: Routing) -> jax.Array:
    """int32 scalar: choices of an expert in one routing that are choices of nobody in the other."""
    nobody = wanted.probabilities.shape[-1]
    return ((wanted.experts != nobody) & (kept.experts == nobody)).sum(dtype=jnp.int32)
