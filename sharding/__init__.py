"""Where arrays live: the model's logical axes on the axes of a device mesh."""

from sharding.rules import PARAMETER_RULES, param_shardings, partition_spec

__all__ = ["PARAMETER_RULES", "param_shardings", "partition_spec"]
