"""Qwen2 in JAX: the model, its cache, generation and tokenizer."""

from typing import TYPE_CHECKING

from qwen2_jax.lazy import lazy_names

if TYPE_CHECKING:
    from qwen2_jax.config import Qwen2Config
    from qwen2_jax.generation import Generation, generate, stream
    from qwen2_jax.model import Output, Qwen2

__all__ = ["Generation", "Output", "Qwen2", "Qwen2Config", "generate", "stream"]

# Found on first use: the streaming converter and `--help` need no JAX, and a command wants to start at once.
__getattr__ = lazy_names(
    __name__,
    {
        "Generation": "generation",
        "Output": "model",
        "Qwen2": "model",
        "Qwen2Config": "config",
        "generate": "generation",
        "stream": "generation",
    },
)
