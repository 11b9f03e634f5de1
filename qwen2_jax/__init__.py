"""Qwen2 in JAX: the model, its cache, generation and tokenizer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2_jax.config import Qwen2Config
    from qwen2_jax.generation import Generation, generate, stream
    from qwen2_jax.model import Output, Qwen2

__all__ = ["Generation", "Output", "Qwen2", "Qwen2Config", "generate", "stream"]

_HOMES = {
    "Generation": "generation",
    "Output": "model",
    "Qwen2": "model",
    "Qwen2Config": "config",
    "generate": "generation",
    "stream": "generation",
}


def __getattr__(name: str) -> Any:
    # Found on first use: the streaming converter and `--help` need no JAX, and a command wants to start at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qwen2_jax.{_HOMES[name]}"), name)
