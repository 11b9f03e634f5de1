"""How a layer of experts is spread over devices: which tokens, how they meet their experts, how many rows at a time.

Arithmetic without JAX: the program (`sharding.experts`) and the planner's formula use the same.
"""

import dataclasses
import math
from collections.abc import Mapping

from sharding.logical import ROW_AXES, axes_that_divide

VARIANTS = ("exchange", "gather")

_FEW_BYTES = 1 << 20
"""Bytes of a group's tokens up to which a collective costs its latency: gathering takes fewer of them, and they do not
wait for each other."""

_MOST_OF_A_GROUP = 2 / 3
"""Share of a group's tokens from which each device may as well receive all of them.

With X tokens on each of P devices, gathering moves (P-1) X rows into a device and as many sums of rows out. The
exchange moves share * (P-1) X rows each way, since a token goes to a device once, however many of its choices live
there. For 8 choices among 64 experts the share is 0.92 with 4 devices, 0.68 with 8, 0.42 with 16, times `slack`. An
all-gather uses the links of a ring or torus better than an all-to-all, and needs no sorting; but room for P X rows."""

_FEWEST_ROWS = 256
"""Rows for which memory does not matter, so that a few tokens never take more than one round."""


@dataclasses.dataclass(frozen=True)
class Split:
    """How one layer runs on a mesh, for one shape of its input."""

    rows: tuple[str, ...]
    """Mesh axes that split the batch."""
    length: tuple[str, ...]
    """Mesh axes that split the sequence: `context`, and those that would split the batch if it divided."""
    partial: tuple[str, ...]
    """Mesh axes whose devices hold summands of the result for the same tokens."""
    tokens: int
    """On each device."""
    variant: str
    """"exchange" or "gather": how tokens meet the experts of other devices; "stay" if no token has to move."""
    slots: int
    """Tokens that a device sends to each other one in a round of the exchange; 0 without one."""
    most_rounds: int
    """Rounds of the exchange if all tokens choose the same device; balanced routing takes one."""
    batch: int
    """(token, choice) pairs that a device's experts compute at once."""
    most_batches: int
    """Batches for each round, at most; balanced routing takes one."""

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes whose devices have different tokens."""
        return (*self.rows, *self.length)


def split_experts(
    sizes: Mapping[str, int],
    shape: tuple[int, int, int],
    experts: int,
    choices: int,
    itemsize: int = 2,
    variant: str | None = None,
    slack: float = 1.25,
    capacity_factor: float | None = None,
) -> Split:
    """Chooses how a layer runs.

    Args:
      sizes: devices by mesh axis.
      shape: [B, T, D] of the layer's input, all devices together.
      experts: of the layer; `expert` must divide them.
      choices: experts for each token.
      itemsize: bytes of an activation.
      variant: "exchange" or "gather" for tokens that are split over `expert`; None chooses by size.
      slack: rows for which there is room over those of balanced routing. What exceeds it takes another round.
      capacity_factor: as `qwen2_jax.moe.with_capacity`, applied on each device.
    """
    rows = axes_that_divide(shape[0], ROW_AXES, sizes)
    # A long row is split over what the batch does not divide by: every device would do the same work otherwise.
    length = axes_that_divide(shape[1], ("context", *(axis for axis in ROW_AXES if axis not in rows)), sizes)
    tokens = shape[0] * shape[1] // math.prod(sizes[axis] for axis in (*rows, *length))
    devices = sizes.get("expert", 1)
    moving = "expert" in (*rows, *length)
    whole = () if moving else ("expert",)
    partial = tuple(axis for axis in ("tensor", *whole) if sizes.get(axis, 1) > 1)

    own = experts // devices
    share = 1 - math.comb(experts - own, choices) / math.comb(experts, choices)
    served = tokens * choices  # of one device's pairs, by one device's experts
    if capacity_factor is not None:
        served = min(served, own * math.ceil(capacity_factor * tokens * choices / experts))
    most = min(tokens, served)
    slots = min(most, _rounded(slack * share * tokens))
    if not moving:
        variant = "stay"
    elif variant is None:
        few = devices * tokens * shape[2] * itemsize <= _FEW_BYTES
        variant = "gather" if few or slots > _MOST_OF_A_GROUP * tokens else "exchange"
    exchanged = variant == "exchange"

    groups = devices if moving else 1
    seen = groups * (slots if exchanged else tokens)
    bound = min(seen * min(choices, own), groups * served)
    batch = min(bound, max(_FEWEST_ROWS, _rounded(slack * groups * tokens * choices / devices)))
    return Split(
        rows=rows,
        length=length,
        partial=partial,
        tokens=tokens,
        variant=variant,
        slots=slots if exchanged else 0,
        most_rounds=-(-most // slots) if exchanged else 1,
        batch=batch,
        most_batches=-(-bound // batch),
    )


def _rounded(rows: float) -> int:
    return 8 * math.ceil(rows / 8)
