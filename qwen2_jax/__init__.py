"""Qwen2 in JAX: the model, its cache, generation and tokenizer."""

from qwen2_jax.config import Qwen2Config
from qwen2_jax.generation import Generation, generate, stream
from qwen2_jax.model import Output, Qwen2

__all__ = ["Generation", "Output", "Qwen2", "Qwen2Config", "generate", "stream"]
