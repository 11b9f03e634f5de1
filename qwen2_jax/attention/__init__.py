"""Causal grouped-query attention, plain and dual-chunk: one function, a reference, and faster paths equal to it."""

from qwen2_jax.attention.attend import attend, choose, implementation_for, implementation_named
from qwen2_jax.attention.context import Context

__all__ = ["Context", "attend", "choose", "implementation_for", "implementation_named"]
