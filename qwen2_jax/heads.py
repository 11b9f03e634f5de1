"""How attention heads are laid out for computing, so that they divide over more devices than there are of them.

Weights keep their true heads. On the way into a product key/value heads are repeated and groups of query heads padded
with heads of zeros; the numbers that come out are the same, the gradients too (those of copies add up, those of padding
are dropped), and there is nothing to undo when weights are saved.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax


class HeadLayout(NamedTuple):
    """What attention computes for every key/value head of the model."""

    copies: int = 1
    """Of each key/value head."""
    group: int = 0
    """Query heads per key/value head of the model, padding included, a multiple of `copies`; 0 for as many as there
    are."""


def head_layout(heads: int, kv_heads: int, devices: int) -> HeadLayout:
    """The layout with the least padding for `heads` query heads that share `kv_heads` evenly, over so many devices.

    Raises:
      ValueError: if it would take as many heads of padding as there are heads.
    """
    own = heads // kv_heads
    for group in range(own, 2 * own):
        for copies in range(1, group + 1):
            if group % copies == 0 and kv_heads * copies % devices == 0:
                return HeadLayout(copies, group)
    raise ValueError(
        f"{heads} query heads over {kv_heads} key/value heads do not spread over {devices} devices of tensor without "
        "computing at least as many again for nothing"
    )


def pad_groups(x: "jax.Array", kv_heads: int, layout: HeadLayout, dim: int) -> "jax.Array":
    """x with zeros for the padding among its query heads, which `dim` counts: N becomes kv_heads * layout.group."""
    import jax.numpy as jnp

    own = x.shape[dim] // kv_heads
    if layout.group in (0, own):
        return x
    split = x.reshape(*x.shape[:dim], kv_heads, own, *x.shape[dim + 1 :])
    widths = [(0, 0)] * split.ndim
    widths[dim + 1] = (0, layout.group - own)
    return jnp.pad(split, widths).reshape(*x.shape[:dim], kv_heads * layout.group, *x.shape[dim + 1 :])


def repeat_heads(x: "jax.Array", layout: HeadLayout, dim: int) -> "jax.Array":
    """x with every key/value head, which `dim` counts, repeated in place."""
    import jax.numpy as jnp

    return x if layout.copies == 1 else jnp.repeat(x, layout.copies, axis=dim)
