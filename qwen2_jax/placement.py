"""Where a run on several devices says what is split over them; on one device, nothing is."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp


class WeightPlacement(Protocol):
    """Of one kind of weight."""

    def gathered(self, weight: jax.Array) -> jax.Array:
        """The weight as products read it."""
        ...

    def scattered(self, gradient: jax.Array) -> jax.Array:
        """Its gradient as it is stored."""
        ...

    def added_rows(self, shape: tuple[int, ...], rows: jax.Array, drows: jax.Array) -> jax.Array:
        """`added_rows` as the gradient of this weight is stored."""
        ...


def added_rows(shape: tuple[int, ...], rows: jax.Array, drows: jax.Array) -> jax.Array:
    """The gradient of a table of `shape` [V, D] whose `rows` [B, T] were read: drows [B, T, D], added up in float32.

    Rows outside of the table are left out.
    """
    return jnp.zeros(shape).at[rows].add(drows.astype(jnp.float32), mode="drop", wrap_negative_indices=False)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Places nothing. `sharding` has the one that knows a mesh; a frozen dataclass too, hashable and
    equal by value, because it is a static argument of compiled programs.

    Logical axes of activations: batch, length (of a sequence, inside a layer), residual (the same between layers),
    cache (slots), embed, heads, kv_heads, head_dim, mlp, vocab, layers, and None for what is never split.
    """

    def activation(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """x, split as its logical axes say, one for each dim."""
        return x

    def heads_together(self, weight: jax.Array, axes: Sequence[str]) -> jax.Array:
        """A weight with these logical axes whose heads are about to be repeated or padded."""
        return weight

    def weight(self, axes: Sequence[str]) -> WeightPlacement | None:
        """For a weight with these logical axes; None if it is read as it is stored."""
        return None
