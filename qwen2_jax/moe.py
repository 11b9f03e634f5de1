"""Mixture of experts: routing, the experts by two backends, and the load-balancing loss."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.einsum import einsum
from qwen2_jax.projection import project


class Routing(NamedTuple):
    """What the router decides for X tokens, k choices each."""

    weights: jax.Array
    """[X, k] in the activations' dtype; they sum to less than 1 unless the model normalises them."""
    experts: jax.Array
    """[X, k] int32, distinct within a row."""
    probabilities: jax.Array
    """[X, E] float32, over all experts."""


class RouterStatistics(NamedTuple):
    """Sums over real tokens and MoE layers, from which `load_balancing_loss` is computed."""

    choices: jax.Array
    """[E] float32: how often each expert was chosen."""
    probability: jax.Array
    """[E] float32: sum of each expert's probability."""
    rows: jax.Array
    """float32: real tokens times MoE layers."""


class Experts(NamedTuple):
    """The weights of E SwiGLU networks."""

    gate: jax.Array
    """[E, F, D]."""
    up: jax.Array
    """[E, F, D]."""
    down: jax.Array
    """[E, D, F]."""


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def route(logits: jax.Array, top_k: int, normalise: bool) -> Routing:
    """Chooses top_k experts for each row of the router's logits [X, E].

    The softmax is taken over all experts, before the choice, in float32; the chosen probabilities are used as they are
    unless `normalise` (norm_topk_prob, false for Qwen2).

    Source: Qwen2 technical report, section 2.2.2, equations 1 and 2.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(probabilities, top_k)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(weights.astype(logits.dtype), experts, probabilities)


def router_statistics(routing: Routing, real: jax.Array) -> RouterStatistics:
    """Sums for one layer over the rows where real [X] bool is true."""
    experts = routing.probabilities.shape[-1]
    real = real.astype(jnp.float32)
    choices = jnp.zeros(experts).at[routing.experts.ravel()].add(jnp.repeat(real, routing.experts.shape[1]))
    return RouterStatistics(choices, einsum("XE,X->E", routing.probabilities, real), real.sum())


def load_balancing_loss(statistics: RouterStatistics) -> jax.Array:
    """E * sum_e f_e P_e over the rows of all layers together; top_k when perfectly balanced, 0 for no rows.

    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6, with every choice of a token counted.
    """
    choices, probability, rows = statistics
    rows = jnp.maximum(rows, 1.0)
    return choices.shape[0] * jnp.sum((choices / rows) * (probability / rows))


def experts_by_loop(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """The reference: every expert runs over every token, weighted by 0 where it was not chosen.

    Args:
      x: [X, D] tokens.

    Returns:
      [X, D], the weighted sum of the chosen experts' outputs.
    """
    total = jnp.zeros_like(x)
    for e in range(experts.gate.shape[0]):
        weight = jnp.where(routing.experts == e, routing.weights, 0).sum(axis=-1, keepdims=True)
        hidden = swiglu(project("XD,FD->XF", x, experts.gate[e]), project("XD,FD->XF", x, experts.up[e]))
        total += project("XF,DF->XD", hidden, experts.down[e]) * weight
    return total


def experts_by_sorting(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """Sorts the (token, choice) pairs by expert and multiplies each expert's rows with its weights only.

    Rows go into tiles of one expert each, so the work is the routed rows rounded up to tiles and no buffer is larger
    than that. Nothing is dropped, however the router chooses. Arguments and result as for `experts_by_loop`.
    """
    tokens, choices = routing.experts.shape
    tiles = _tiles(routing.experts, experts.gate.shape[0])

    rows = jnp.zeros((tiles.rows, x.shape[1]), x.dtype).at[tiles.row_of_pair].set(jnp.repeat(x, choices, axis=0))
    rows = rows.reshape(-1, tiles.height, x.shape[1])
    product = functools.partial(_grouped, tiles.expert_of_tile, tiles.used)
    hidden = swiglu(product(rows, experts.gate), product(rows, experts.up))
    out = product(hidden, experts.down).reshape(tiles.rows, x.shape[1])

    pairs = out[tiles.row_of_pair].reshape(tokens, choices, -1)
    return einsum("XkD,Xk->XD", pairs, routing.weights).astype(x.dtype)


BACKENDS = {"loop": experts_by_loop, "sorted": experts_by_sorting}


class _Tiles(NamedTuple):
    row_of_pair: jax.Array  # [X * k] where each (token, choice) pair stands
    expert_of_tile: jax.Array  # [rows / height]
    used: jax.Array  # tiles that hold anything; they come first
    rows: int
    height: int


def _tiles(chosen: jax.Array, experts: int) -> _Tiles:
    """Gives each pair of chosen [X, k] a row, such that every tile of rows belongs to one expert."""
    pairs = chosen.size
    # About the mean load of an expert: higher tiles would be mostly padding, lower ones re-read the weights more often.
    height = min(256, max(8, 1 << (max(pairs // experts, 1) - 1).bit_length()))
    most = min(pairs, experts + pairs // height)
    order = jnp.argsort(chosen.ravel(), stable=True)
    load = jnp.zeros(experts, jnp.int32).at[chosen.ravel()].add(1)
    tiles_of_expert = -(-load // height)
    first_tile = jnp.cumsum(tiles_of_expert) - tiles_of_expert
    first_pair = jnp.cumsum(load) - load
    expert = chosen.ravel()[order]
    row = first_tile[expert] * height + jnp.arange(pairs, dtype=jnp.int32) - first_pair[expert]
    expert_of_tile = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), tiles_of_expert, total_repeat_length=most)
    row_of_pair = jnp.zeros(pairs, jnp.int32).at[order].set(row)
    return _Tiles(row_of_pair, expert_of_tile, tiles_of_expert.sum(), most * height, height)


@functools.partial(jax.custom_vjp)
def _grouped(expert_of_tile: jax.Array, used: jax.Array, rows: jax.Array, kernels: jax.Array) -> jax.Array:
    """rows [tiles, height, I] times the kernel [O, I] of each tile's expert, out of kernels [E, O, I]."""
    return _by_tile(expert_of_tile, used, rows, kernels, "XI,OI->XO")


def _by_tile(expert_of_tile, used, rows, kernels, equation):
    kernels = kernels.astype(rows.dtype)
    width = kernels.shape[1] if equation.endswith("O") else kernels.shape[2]

    def tile(i, out):
        y = einsum(equation, rows[i], kernels[expert_of_tile[i]])
        return out.at[i].set(y.astype(out.dtype))

    return lax.fori_loop(0, used, tile, jnp.zeros((*rows.shape[:2], width), rows.dtype))


def _grouped_fwd(expert_of_tile, used, rows, kernels):
    return _grouped(expert_of_tile, used, rows, kernels), (expert_of_tile, used, rows, kernels)


def _grouped_bwd(residuals, dout):
    expert_of_tile, used, rows, kernels = residuals

    def tile(i, dkernels):
        part = einsum("XO,XI->OI", dout[i], rows[i])
        return dkernels.at[expert_of_tile[i]].add(part)

    dkernels = lax.fori_loop(0, used, tile, jnp.zeros(kernels.shape, jnp.float32))
    drows = _by_tile(expert_of_tile, used, dout, kernels, "XO,OI->XI")
    return None, None, drows, dkernels.astype(kernels.dtype)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
