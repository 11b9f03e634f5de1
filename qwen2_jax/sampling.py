"""From logits to the next token, in the order in which transformers applies each step."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.json_object import brief

# The program computes with them in float32, and XLA takes numbers below the normal ones for 0.
_TINY, _HUGE = 1.2e-38, 3.4e38


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens; checked when built.

    Raises:
      ValueError: for a value outside its range, NaN included; every one is named.
    """

    temperature: float = 0.0
    """0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Keep only the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability reaches top_p; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens seen in the prompt or the answer if positive, else multiplies; 1 changes nothing."""

    def __post_init__(self):
        rules = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        got = {name: brief(getattr(self, name)) for name in rules}
        bad = [f"{name} must be {want}, got {got[name]}" for name, (good, want) in rules.items() if not good]
        numbers = (self.temperature, self.top_p, self.repetition_penalty)
        if not bad and (outside := [number for number in numbers if number and not _TINY <= number <= _HUGE]):
            bad = [f"sampling is computed in float32, with numbers from {_TINY} to {_HUGE}, got {brief(outside[0])}"]
        if bad:
            raise ValueError("; ".join(bad))

    @property
    def steps(self) -> "Steps":
        """The part that decides which program is compiled."""
        greedy = self.temperature == 0
        return Steps(greedy, 0 if greedy else self.top_k, not greedy and self.top_p < 1, self.repetition_penalty != 1)

    @property
    def values(self) -> "Values":
        """The part that a compiled program takes as arguments."""
        numbers = (self.temperature, self.top_p, self.repetition_penalty)
        return Values(*(jnp.asarray(number, jnp.float32) for number in numbers))


class Steps(NamedTuple):
    greedy: bool
    top_k: int
    top_p: bool
    penalised: bool


class Values(NamedTuple):
    temperature: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array


def next_token(logits: jax.Array, key: jax.Array, seen: jax.Array | None, steps: Steps, values: Values) -> jax.Array:
    """Chooses one token per row.

    Args:
      logits: [B, V] float32.
      key: a random key; unused if greedy.
      seen: [B, V] bool, the ids in each row's prompt and answer so far; only read if penalised.

    Returns:
      [B] int32.
    """
    if steps.penalised:
        assert seen is not None
        penalty = values.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if steps.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Below the largest: a temperature near 0 then makes 0 of it and -inf of the rest, and never inf - inf.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / values.temperature

    # With top-k only k candidates are left, sorted; everything after runs on k numbers instead of V.
    ids = None
    if 0 < steps.top_k < logits.shape[-1]:
        logits, ids = lax.top_k(logits, steps.top_k)
    elif steps.top_p:
        logits, ids = lax.top_k(logits, logits.shape[-1])
    if steps.top_p:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < values.top_p, logits, -jnp.inf)
    choice = jax.random.categorical(key, logits, axis=-1)
    if ids is not None:
        choice = jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
    return choice.astype(jnp.int32)
