"""Training: the objective."""

from train.loss import IGNORE, Loss, next_token_loss, next_token_targets

__all__ = ["IGNORE", "Loss", "next_token_loss", "next_token_targets"]
