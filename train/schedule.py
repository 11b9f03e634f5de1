"""The learning rate, by the number of updates made."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
"""From the number of updates made, a scalar int32, to the rate of the next one, a scalar float32."""


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then a cosine, or a plateau and a decay at the end, or a plateau.

    Of `updates` in all, number n, counted from 0, is made with `peak` times
    - (n + 1) / warm_up, while n < warm_up: none is made with 0;
    - cosine: from 1 to `final` along half a period of a cosine;
    - wsd: 1, and over the last `decay` updates from 1 to `final` by 1 - sqrt(x);
    - constant: 1.
    `final` itself is reached behind the last one.

    Source: cosine, SGDR (arXiv 1608.03983), equation 5; wsd, MiniCPM (arXiv 2404.06395), section 4; 1 - sqrt, which
    beats the line, Scaling laws and compute-optimal training beyond fixed training durations (arXiv 2405.18392),
    section 3.
    """

    peak: float = 3e-4
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warm_up: int = 0
    """Updates."""
    decay: int = 0
    """Updates at the end of wsd."""
    final: float = 0.1
    """Fraction of the peak."""

    def __post_init__(self):
        if not (self.peak > 0 and math.isfinite(self.peak)):
            raise ValueError(f"the peak of the learning rate must be positive, got {self.peak}")
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ValueError(f"the kind of the learning rate must be one of cosine, wsd, constant, got {self.kind!r}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final is a fraction of the peak, from 0 to 1, got {self.final}")
        if self.warm_up < 0:
            raise ValueError(f"warm_up must be 0 or more updates, got {self.warm_up}")
        if (self.kind == "wsd") != (self.decay > 0):
            raise ValueError(f"decay is the updates that wsd decays over: with {self.kind}, got {self.decay}")

    def over(self, updates: int) -> Schedule:
        """Of a run of so many updates. Raises ValueError if warm-up and decay do not fit in."""
        if self.warm_up + self.decay > updates:
            raise ValueError(
                f"warm_up of {self.warm_up} and decay of {self.decay} updates do not fit into {updates}; shorten them"
            )
        falling = {"cosine": updates - self.warm_up, "wsd": self.decay, "constant": 0}[self.kind]

        def rate(count: jax.Array) -> jax.Array:
            factor = self.final + (1 - self.final) * self._shape(updates - count, falling)
            if self.warm_up:
                factor *= jnp.minimum(count + 1, self.warm_up).astype(jnp.float32) / self.warm_up
            return self.peak * factor

        return rate

    def _shape(self, left: jax.Array, falling: int) -> jax.Array:
        """From 1 to 0 over the last `falling` updates, with `left` still to come."""
        if not falling:
            return jnp.float32(1)
        left = jnp.clip(left, 0, falling)
        # Both are quotients of whole numbers: of 1 less the other, compilers make something else than 0 at the ends.
        share, done = (count.astype(jnp.float32) / falling for count in (left, falling - left))
        # 1 - sqrt(done), exact where that is small.
        return jnp.square(jnp.sin(math.pi / 2 * share)) if self.kind == "cosine" else share / (1 + jnp.sqrt(done))
