"""Training: data, objective, step, loop, checkpoints. Offered here: the loss in its plain form."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy import lazy_names

if TYPE_CHECKING:
    from train.loss import IGNORE, Loss, next_token_loss, next_token_targets

__all__ = ["IGNORE", "Loss", "next_token_loss", "next_token_targets"]

# Found on first use: the processes that tokenize need no JAX.
__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "loss"))
