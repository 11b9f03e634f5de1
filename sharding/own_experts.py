"""A device's own experts over tokens of which many may choose none of them, in batches of bounded size.

How many (token, choice) pairs a device gets is known only when it runs: about the mean, or all. Room for all would be
several times too much memory, so pairs are computed in batches of a fixed size, as many as it takes. Gradients are
written out because a loop of unknown length cannot be differentiated; they compute each batch again. Rows move by
gathers in both directions, since scatters are slow on accelerators.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.einsum import einsum
from qwen2_jax.moe import BACKENDS, Experts, swiglu
from qwen2_jax.moe.backends import GROUPED_PRODUCTS
from qwen2_jax.moe.rows import Groups, group


class Batches(NamedTuple):
    """How pairs are cut into batches."""

    backend: str
    """A name in `qwen2_jax.moe.BACKENDS`."""
    size: int
    """Pairs of a batch."""
    most: int
    """Batches that all pairs can take."""


class Choices(NamedTuple):
    """What N tokens chose among E experts of this device."""

    weights: jax.Array
    """[N, k] float32."""
    experts: jax.Array
    """[N, k] int32; E is none of these experts, and its weight is 0."""


def run(batches: Batches, x: jax.Array, choices: Choices, experts: Experts) -> jax.Array:
    """The sum over choices of weight times expert(token): x [N, D] -> [N, D] float32."""
    groups = group(choices.experts.ravel(), experts.gate.shape[0])

    def batch(i: jax.Array) -> jax.Array:
        pairs = _pairs(i, batches.size, choices, groups)
        out = _compute(batches.backend, x[pairs.token], pairs, experts)
        return sums(out, *_few_columns(pairs.place, choices.weights, experts))

    return repeated(batch, _needed(groups, batches), batches.most)


def gradients(
    batches: Batches, x: jax.Array, choices: Choices, experts: Experts, dout: jax.Array
) -> tuple[jax.Array, jax.Array, Experts]:
    """Gradients of `run` for dout [N, D] in x's dtype: of x [N, D], of the weights [N, k], of the experts; float32."""
    groups = group(choices.experts.ravel(), experts.gate.shape[0])

    def batch(i: jax.Array) -> tuple[jax.Array, jax.Array, Experts]:
        pairs = _pairs(i, batches.size, choices, groups)
        out, pull = _vjp(batches.backend, x[pairs.token], pairs, experts)
        dy = dout[pairs.token]
        dweights = einsum("XD,XD->X", out, dy)
        dx, dexperts = pull((dy.astype(jnp.float32) * pairs.weight).astype(out.dtype))
        dweights = dweights.at[pairs.place].get(mode="fill", fill_value=0.0)
        return sums(dx, _few_columns(pairs.place, choices.weights, experts)[0]), dweights, dexperts

    return repeated(batch, _needed(groups, batches), batches.most)


def repeated(step: Callable[[jax.Array], Any], count: jax.Array, most: int) -> Any:
    """The sum of step(0), step(1), ... of `count` steps, 1 to `most`; the first is not part of a loop."""
    first = step(jnp.int32(0))
    if most == 1:
        return first

    def body(state):
        i, total = state
        return i + 1, jax.tree.map(jnp.add, total, step(i))

    return lax.while_loop(lambda state: state[0] < count, body, (jnp.int32(1), first))[1]


def _needed(groups: Groups, batches: Batches) -> jax.Array:
    return -(-groups.sizes.sum() // batches.size)


class _Pairs(NamedTuple):
    """One batch: M pairs in the order of their experts, none of these last."""

    token: jax.Array  # [M]
    weight: jax.Array  # [M, 1]
    expert: jax.Array  # [M]
    sizes: jax.Array  # [E] rows of each expert
    place: jax.Array  # [N, k] each pair's row; M, one past the last, if it is not in this batch


def _pairs(i: jax.Array, size: int, choices: Choices, groups: Groups) -> _Pairs:
    tokens, k = choices.experts.shape
    nobody = groups.sizes.size
    begin, ends = i * size, jnp.cumsum(groups.sizes)
    at = begin + jnp.arange(size, dtype=jnp.int32)
    pair = groups.order.at[at].get(mode="clip")
    within = [jnp.clip(edge - begin, 0, size) for edge in (ends - groups.sizes, ends)]
    place = groups.place.reshape(tokens, k) - begin
    inside = (choices.experts < nobody) & (place >= 0) & (place < size)
    return _Pairs(
        token=pair // k,
        weight=choices.weights.ravel()[pair][:, None],
        expert=jnp.where(at < ends[-1], choices.experts.ravel()[pair], nobody),
        sizes=within[1] - within[0],
        place=jnp.where(inside, place, size),
    )


def _few_columns(place: jax.Array, weights: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """No more columns than there are experts: a token has no more pairs here, wherever they stand among its choices."""
    own = experts.gate.shape[0]
    if place.shape[1] <= own:
        return place, weights
    place, weights = lax.sort((place, weights), dimension=1, num_keys=1)
    return place[:, :own], weights[:, :own]


def sums(rows: jax.Array, place: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """For each of N tokens the sum of its rows, in float32.

    Args:
      rows: [M, D].
      place: [N, m] int32, which rows; M for none.
      weights: [N, m] float32 factors, if any.

    Returns:
      [N, D] float32.
    """
    total = jnp.zeros((place.shape[0], rows.shape[1]), jnp.float32)
    for first in range(0, place.shape[1], _COLUMNS):
        # One after the other, lest all m rows of all tokens are in memory together.
        total, place = lax.optimization_barrier((total, place))
        for column in range(first, min(first + _COLUMNS, place.shape[1])):
            row = rows.at[place[:, column]].get(mode="fill", fill_value=0).astype(jnp.float32)
            total += row if weights is None else row * weights[:, column, None]
    return total


_COLUMNS = 4
"""Gathers whose results are added up in one pass."""


def _compute(backend: str, rows: jax.Array, pairs: _Pairs, experts: Experts) -> jax.Array:
    if backend not in GROUPED_PRODUCTS:
        return BACKENDS[backend](rows, pairs.expert, experts)
    # Without the names of `run_experts`, by which a remat policy would keep what gradients here compute again.
    product = functools.partial(GROUPED_PRODUCTS[backend], rows, pairs.sizes)
    return GROUPED_PRODUCTS[backend](swiglu(product(experts.gate), product(experts.up)), pairs.sizes, experts.down)


def _vjp(
    backend: str, rows: jax.Array, pairs: _Pairs, experts: Experts
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, Experts]]]:
    """As `jax.vjp` of `_compute`, but the experts' gradients are float32, as those of float32 weights would be."""
    if backend not in GROUPED_PRODUCTS:
        exact = Experts(*(kernel.astype(jnp.float32) for kernel in experts))
        return jax.vjp(lambda rows, experts: _compute(backend, rows, pairs, experts), rows, exact)

    def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return GROUPED_PRODUCTS[backend](rows, pairs.sizes, kernel)

    def pull_product(rows: jax.Array, kernel: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
        (drows,) = jax.vjp(lambda rows: product(rows, kernel), rows)[1](dout)
        # A kernel's gradient takes its dtype from the kernel, and nothing else.
        any_kernel = jnp.zeros(kernel.shape, jnp.float32)
        (dkernel,) = jax.vjp(lambda kernel: product(rows, kernel), any_kernel)[1](dout)
        return drows, dkernel

    hidden, pull_hidden = jax.vjp(swiglu, product(rows, experts.gate), product(rows, experts.up))

    def pull(dout: jax.Array) -> tuple[jax.Array, Experts]:
        dhidden, ddown = pull_product(hidden, experts.down, dout)
        dgate, dup = pull_hidden(dhidden)
        from_gate, dgate = pull_product(rows, experts.gate, dgate)
        from_up, dup = pull_product(rows, experts.up, dup)
        return from_gate + from_up, Experts(dgate, dup, ddown)

    return product(hidden, experts.down), pull
