"""What one device does for a layer of experts: bring tokens and experts together, compute, bring the results back.

Inside of `jax.shard_map`; `expert` and `fsdp` are its axes. Gradients are written out: the backward pass moves tokens
and weights again instead of keeping what arrived, so only the device's own tokens and its part of the weights are kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.moe import Experts
from qwen2_jax.moe.rows import group
from qwen2_jax.projection import take_as
from sharding import own_experts
from sharding.expert_split import Split
from sharding.own_experts import Batches, Choices, repeated, sums

_EXPERT = "expert"


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is fixed when a layer is compiled."""

    split: Split
    backend: str
    experts: int
    """Of the layer."""
    devices: int
    """Of `expert`."""
    gathered: bool
    """Whether the weights' width is split over `fsdp`."""
    dtype: jnp.dtype
    """Of the activations."""
    ragged: bool
    """Whether the platform can send just the rows that exist."""

    @property
    def batches(self) -> Batches:
        return Batches(self.backend, self.split.batch, self.split.most_batches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(layer: Layer, x: jax.Array, weights: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """The chosen experts' weighted sum for this device's tokens, or its share of it.

    Args:
      layer: how.
      x: [X, D] tokens, float32 like their gradient, which may be one of several summands.
      weights: [X, k] float32.
      chosen: [X, k] int32, of all the layer's experts; one past the last is nobody.
      experts: as stored: [E / P, F, D / fsdp] and [E / P, D / fsdp, F] for P devices of `expert`.

    Returns:
      [X, D] float32. If the tokens are the same on all devices of `expert`, what this device's experts add to it.
    """
    return _run_fwd(layer, x, weights, chosen, experts)[0]


def _run_fwd(layer: Layer, x: jax.Array, weights: jax.Array, chosen: jax.Array, experts: Experts):
    choices = Choices(weights, chosen)
    x = x.astype(layer.dtype)
    kept = x, choices, experts
    experts = _whole(layer, experts)
    if layer.split.variant == "exchange":
        return _exchange(layer, x, choices, experts), kept
    out = own_experts.run(layer.batches, _gather(layer, x), _own(layer, _gather(layer, choices)), experts)
    # PyTorch adds up the choices in the activations' dtype too.
    return _scatter(layer, out, layer.dtype), kept


def _run_bwd(layer: Layer, kept, dout: jax.Array):
    x, choices, stored = kept
    experts, dout = _whole(layer, stored), dout.astype(layer.dtype)
    if layer.split.variant == "exchange":
        dx, dweights, dexperts = _exchange_gradients(layer, x, choices, experts, dout)
    else:
        x, choices, dout = _gather(layer, (x, choices, dout))
        dx, dweights, dexperts = own_experts.gradients(layer.batches, x, _own(layer, choices), experts, dout)
        dx, dweights = _scatter(layer, dx, layer.dtype), _scatter(layer, dweights, dweights.dtype)
    return dx, dweights, None, _stored(layer, dexperts, stored)


run.defvjp(_run_fwd, _run_bwd)


def _whole(layer: Layer, experts: Experts) -> Experts:
    """Weights in the activations' dtype, of this device's experts and its part of their inner width."""
    experts = Experts(*(take_as(kernel, layer.dtype) for kernel in experts))
    if not layer.gathered:
        return experts
    return Experts(*(lax.all_gather(kernel, "fsdp", axis=dim, tiled=True) for kernel, dim in _by_width(experts)))


def _stored(layer: Layer, gradients: Experts, stored: Experts) -> Experts:
    """The inverse for gradients: summed over `fsdp` in float32, each device's part in the weights' dtype."""
    if layer.gathered:
        gradients = Experts(
            *(lax.psum_scatter(g, "fsdp", scatter_dimension=dim, tiled=True) for g, dim in _by_width(gradients))
        )
    return Experts(*(g.astype(kernel.dtype) for g, kernel in zip(gradients, stored, strict=True)))


def _by_width(experts: Experts) -> list[tuple[jax.Array, int]]:
    """Each kernel with its dim of the model's width."""
    return [(experts.gate, 2), (experts.up, 2), (experts.down, 1)]


def _own(layer: Layer, choices: Choices) -> Choices:
    """Choices of this device's experts, numbered from 0."""
    count = layer.experts // layer.devices
    experts = choices.experts - (lax.axis_index(_EXPERT) * count if layer.devices > 1 else 0)
    own = (experts >= 0) & (experts < count)
    return Choices(jnp.where(own, choices.weights, 0.0), jnp.where(own, experts, count))


def _gather(layer: Layer, tree):
    """Every array of the group's devices, one after the other."""
    if layer.split.variant == "stay":
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, _EXPERT, axis=0, tiled=True), tree)


def _scatter(layer: Layer, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The group's sums, each device's part, moved in a dtype."""
    if layer.split.variant == "stay":
        return x
    return lax.psum_scatter(x.astype(dtype), _EXPERT, scatter_dimension=0, tiled=True).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Routes:
    """Where this device's X tokens go: to m devices at most, to each of them once."""

    destination: jax.Array  # [X, m], P for nowhere
    slot: jax.Array  # [X, m] place among the tokens with that destination
    order: jax.Array  # [X * m] tokens by destination
    first: jax.Array  # [P] where each destination's begin there
    sizes: jax.Array  # [P]


def _routes(layer: Layer, choices: Choices) -> _Routes:
    tokens, devices = len(choices.experts), layer.devices
    owner = choices.experts // (layer.experts // devices)
    if devices < owner.shape[1]:
        everywhere = jnp.broadcast_to(jnp.arange(devices, dtype=jnp.int32)[None], (tokens, devices))
        used = (owner[:, :, None] == everywhere[:, None]).any(axis=1)
        destination = jnp.where(used, everywhere, devices)
    else:
        earlier = jnp.tri(owner.shape[1], k=-1, dtype=bool)[None]
        again = ((owner[:, :, None] == owner[:, None]) & earlier).any(axis=2)
        destination = jnp.where(again, devices, owner)
    groups = group(destination.ravel(), devices)
    first = jnp.cumsum(groups.sizes) - groups.sizes
    slot = groups.place.reshape(destination.shape) - first.at[destination].get(mode="clip")
    return _Routes(destination, slot, groups.order // destination.shape[1], first, groups.sizes)


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round: C slots for each destination."""

    layer: Layer
    token: jax.Array  # [P, C] this device's, in the slots of each destination
    sent: jax.Array  # [P] how many slots are filled
    received: jax.Array  # [P] likewise in those that arrive
    choices: Choices  # [P * C, k] of this device's experts, by the tokens that arrive
    slot: jax.Array  # [X, m] where each token's results come back; P * C if not in this round

    def send(self, x: jax.Array) -> jax.Array:
        """x [X, D] of this device's tokens -> [P * C, D] of those that arrive."""
        return self._swap(x[self.token.ravel()], self.sent, self.received)

    def sums(self, rows: jax.Array) -> jax.Array:
        """Results [P * C, D] for the tokens that arrived -> their sums for this device's tokens, [X, D] float32."""
        return sums(self._swap(rows, self.received, self.sent), self.slot)

    def sums_of_numbers(self, rows: jax.Array) -> jax.Array:
        """As `sums` for a few numbers [P * C, k], which are not worth counting."""
        return sums(_all_to_all(rows, self.layer.devices), self.slot)

    def _swap(self, rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
        if not self.layer.ragged:
            return _all_to_all(rows, self.layer.devices)
        slots = jnp.int32(rows.shape[0] // self.layer.devices)
        offsets = jnp.arange(self.layer.devices, dtype=jnp.int32) * slots
        there = jnp.full_like(offsets, lax.axis_index(_EXPERT) * slots)
        return lax.ragged_all_to_all(rows, jnp.zeros_like(rows), offsets, sent, there, received, axis_name=_EXPERT)


def _all_to_all(rows: jax.Array, devices: int) -> jax.Array:
    return lax.all_to_all(rows.reshape(devices, -1, *rows.shape[1:]), _EXPERT, 0, 0).reshape(rows.shape)


def _round(layer: Layer, choices: Choices, routes: _Routes, i: jax.Array) -> _Round:
    slots, devices = layer.split.slots, layer.devices
    begin = i * slots
    sent = jnp.clip(routes.sizes - begin, 0, slots)
    each = jnp.arange(slots, dtype=jnp.int32)[None]
    filled = each < sent[:, None]
    token = routes.order.at[routes.first[:, None] + begin + each].get(mode="clip")

    experts = jnp.where(filled[..., None], choices.experts[token], layer.experts)
    weights = lax.bitcast_convert_type(choices.weights[token], jnp.int32)
    packed = jnp.concatenate([experts, weights], axis=2).reshape(devices * slots, -1)
    experts, weights = jnp.split(_all_to_all(packed, devices), 2, axis=1)
    arrived = Choices(lax.bitcast_convert_type(weights, jnp.float32), experts)
    received = (experts < layer.experts).any(axis=1).reshape(devices, slots).sum(axis=1, dtype=jnp.int32)

    slot = routes.slot - begin
    inside = (routes.destination < devices) & (slot >= 0) & (slot < slots)
    slot = jnp.where(inside, routes.destination * slots + slot, devices * slots)
    return _Round(layer, token, sent, received, _own(layer, arrived), slot)


def _rounds(layer: Layer, routes: _Routes) -> jax.Array:
    """The same on every device, so that all take part in each other's rounds."""
    return lax.pmax(-(-routes.sizes.max() // layer.split.slots), layer.split.token_axes)


def _exchange(layer: Layer, x: jax.Array, choices: Choices, experts: Experts) -> jax.Array:
    routes = _routes(layer, choices)

    def one_round(i: jax.Array) -> jax.Array:
        here = _round(layer, choices, routes, i)
        out = own_experts.run(layer.batches, here.send(x), here.choices, experts)
        return here.sums(out.astype(layer.dtype))

    return repeated(one_round, _rounds(layer, routes), layer.split.most_rounds)


def _exchange_gradients(
    layer: Layer, x: jax.Array, choices: Choices, experts: Experts, dout: jax.Array
) -> tuple[jax.Array, jax.Array, Experts]:
    routes = _routes(layer, choices)

    def one_round(i: jax.Array) -> tuple[jax.Array, jax.Array, Experts]:
        here = _round(layer, choices, routes, i)
        dx, dweights, dexperts = own_experts.gradients(
            layer.batches, here.send(x), here.choices, experts, here.send(dout)
        )
        return here.sums(dx.astype(layer.dtype)), here.sums_of_numbers(dweights), dexperts

    return repeated(one_round, _rounds(layer, routes), layer.split.most_rounds)
