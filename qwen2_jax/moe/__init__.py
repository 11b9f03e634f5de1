"""Mixture of experts: routing, the experts by several backends, and what the routers did."""

from qwen2_jax.moe.backends import BACKENDS, Backend, backend_name, check_moe, default_backend, moe
from qwen2_jax.moe.experts import Experts, swiglu
from qwen2_jax.moe.routing import Routing, capacity_of, dropped_choices, keep, route, with_capacity
from qwen2_jax.moe.statistics import RouterStatistics, load_balancing_loss, router_metrics, router_statistics

__all__ = [
    "BACKENDS",
    "Backend",
    "Experts",
    "RouterStatistics",
    "Routing",
    "backend_name",
    "capacity_of",
    "check_moe",
    "default_backend",
    "dropped_choices",
    "keep",
    "load_balancing_loss",
    "moe",
    "route",
    "router_metrics",
    "router_statistics",
    "swiglu",
    "with_capacity",
]
