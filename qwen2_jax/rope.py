"""Rotary position embedding in the half-rotation layout: dimension i is paired with i + H/2."""

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """[H/2] float32: theta^(-2i/H), rounded to float32 where the PyTorch code that trained the weights rounds.

    Only the power is taken in float64: numpy's float32 power is off by one unit in the last place for one entry in ten,
    which at position 32,768 is an angle of 0.002.

    Source: RoFormer (arXiv 2104.09864), section 3.2.2.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    return np.float32(1) / powers.astype(np.float32)


def rotary_tables(positions: jax.Array, frequencies: np.ndarray, dtype: jax.typing.DTypeLike):
    """cos and sin [B, T, H/2] of `dtype` for integer positions [B, T].

    Angles are float32 whatever `dtype` is: bfloat16 cannot tell position 257 from 256.
    """
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates queries or keys x [B, T, heads, H] by the tables of `rotary_tables`, [B, T, H/2] each."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
