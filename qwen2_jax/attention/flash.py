"""One gradient rule for every path that computes attention.

A kernel's backward pass gets the output and the log-sum-exp of the whole softmax, so what it returns is exact for
whatever part of the keys it is given, and no gradient ever flows through a log-sum-exp.

Source: FlashAttention-2 (arXiv 2307.08691), section 2.3.2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from qwen2_jax.attention.context import Context
from qwen2_jax.rope import Rotation


class Kernel(NamedTuple):
    """Two functions of query [B, K, G, T, H] (not rotated), key and value [B, K, S, H], rotation and context."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    """Returns out [B, K, G, T, H] of query's dtype and the log-sum-exp of the scaled scores, [B, K, G, T] float32."""
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    """Takes also out, log-sum-exp and out's gradient; returns the gradients of query, key and value."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash_attention(
    kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, rotation: Rotation, context: Context
) -> jax.Array:
    """[B, K, G, T, H]: the kernel's output, differentiated by the kernel's backward pass."""
    return kernel.forward(query, key, value, rotation, context)[0]


def _forward(kernel, query, key, value, rotation, context):
    out, lse = kernel.forward(query, key, value, rotation, context)
    # Named here, or rematerialisation could not keep the log-sum-exp and would run the kernel again for it.
    out, lse = checkpoint_name(out, "attended"), checkpoint_name(lse, "attended")
    return out, (query, key, value, rotation, context, out, lse)


def _backward(kernel, residuals, dout):
    return *kernel.backward(*residuals, dout), None, None


flash_attention.defvjp(_forward, _backward)
