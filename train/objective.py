"""What a training step makes smaller. A new objective is one file: its data, and its loss."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Options
from qwen2_jax.model import Params
from train.loss import CHUNK


class Step(NamedTuple):
    """How to compute a step, as opposed to what."""

    dtype: jax.typing.DTypeLike = jnp.bfloat16
    """Of activations, and of weights in products."""
    remat: str = "full"
    """A policy of `qwen2_jax.remat`."""
    options: Options = Options()
    chunk: int = CHUNK
    """Tokens per device whose logits exist at a time."""
    mesh: Mesh | None = None
    """The one that `options` are for."""
    accumulate: int = 1
    """Micro-batches of a batch, A, that go through the model one after the other. If there are several, every array of
    a batch has A in front: [A, B, T]."""


class Objective(Protocol):
    """A loss, as shares that the micro-batches of a batch add to it, so that how a batch is cut up does not matter.

    An objective is hashable and equal by value (a frozen dataclass of its coefficients). Its data is any
    `train.data.batches.Rows`; its batches are what these rows are, a pytree of arrays, with the rows in front.
    Supervised fine-tuning is `train.pretraining.Pretraining` on rows whose targets ignore the prompts. Preference
    optimization (DPO, arXiv 2305.18290, equation 7) is a dataclass with `beta`, on rows of tokens and targets [2, T],
    chosen and rejected, and of the reference model's log-probabilities [2], which its data computes once: `weight`
    counts pairs; a share is the sum over pairs of -log_sigmoid(beta * the difference of the two texts' gains over the
    reference), divided by the weight; it sums accuracies and margins.
    """

    def weight(self, batch: Any) -> jax.Array:
        """What a micro-batch counts for, a scalar float32: for a mean over tokens, how many there are."""
        ...

    def __call__(
        self, config: Qwen2Config, params: Params, batch: Any, how: Step, weight: jax.Array
    ) -> tuple[jax.Array, Any]:
        """A micro-batch's share of the loss, and what else to know of it.

        Args:
          params: stacked.
          weight: of the whole batch, a scalar float32, not 0: what sums of this micro-batch are divided by.

        Returns:
          A scalar float32, and a pytree of arrays. Those of all micro-batches are added up.
        """
        ...

    def metrics(self, sums: Any) -> dict[str, jax.Array]:
        """Scalars for the log, of the added pytrees of all micro-batches."""
        ...
