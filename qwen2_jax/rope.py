"""Rotary position embedding in the half-rotation layout: dimension i is paired with i + H/2."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.config import Qwen2Config
from qwen2_jax.yarn import Yarn


class Rotation(NamedTuple):
    """What x is turned by; shapes broadcast against x[..., : H/2]."""

    cos: jax.Array
    sin: jax.Array


class Rotations(NamedTuple):
    query: Rotation
    """[R, B, T, H/2]: R is 1, or 3 with Dual Chunk Attention (intra, successive, inter)."""
    key: Rotation
    """[B, T, H/2]."""


def inverse_frequencies(head_dim: int, theta: float, yarn: Yarn | None = None) -> np.ndarray:
    """[H/2] float32: theta^(-2i/H), rounded to float32 where the PyTorch code that trained the weights rounds.

    Only the power is taken in float64: numpy's float32 power is off by one unit in the last place for one entry in ten,
    which at position 32,768 is an angle of 0.002.

    Source: RoFormer (arXiv 2104.09864), section 3.2.2; YaRN (arXiv 2309.00071), section 3.2.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)
    kept = np.float32(1) / powers
    if yarn is None:
        return kept
    keep = np.float32(1) - yarn.ramp(head_dim, theta)
    stretched = np.float32(1) / (np.float32(yarn.factor) * powers)
    return stretched * (1 - keep) + kept * keep


def rotations(config: Qwen2Config, positions: jax.Array, lengths: jax.Array, dtype: jax.typing.DTypeLike) -> Rotations:
    """How a model turns queries and keys at integer positions [B, T].

    Args:
      config: plain RoPE, YaRN, Dual Chunk Attention, or the last two together.
      positions: [B, T] int32.
      lengths: [B, T] int32, the tokens of the document that each token belongs to; only read for a Dual Chunk
        temperature of the whole prompt.
      dtype: of the tables.
    """
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.yarn)
    scale = 1.0 if config.yarn is None else config.yarn.attention_scale
    query_positions: tuple[jax.Array, ...] = (positions,)
    key_positions = positions
    query_scale = key_scale = jnp.full(positions.shape, scale)
    if (dual_chunk := config.dual_chunk) is not None:
        query_positions, key_positions = dual_chunk.query_positions(positions), dual_chunk.key_positions(positions)
        if trained := dual_chunk.original_max_position_embeddings:
            if dual_chunk.temperature == "query":
                query_scale *= jnp.square(temperature(positions + 1, trained))
            else:
                query_scale *= temperature(lengths, trained)
                key_scale *= temperature(lengths, trained)
    return Rotations(
        query=rotary_tables(jnp.stack(query_positions), frequencies, query_scale[None], dtype),
        key=rotary_tables(key_positions, frequencies, key_scale, dtype),
    )


def temperature(lengths: jax.Array, trained: int) -> jax.Array:
    """T(n) = max(1, 0.1 ln(n / trained) + 1), float32, for integer lengths n.

    Source: Qwen2.5-1M technical report (arXiv 2501.15383), equation 1.
    """
    return jnp.maximum(1.0, 0.1 * jnp.log(lengths.astype(jnp.float32) / trained) + 1.0)


def rotary_tables(
    positions: jax.Array, frequencies: np.ndarray, scale: jax.Array, dtype: jax.typing.DTypeLike
) -> Rotation:
    """cos and sin [..., H/2] of `dtype` for integer positions [...], times scale, which broadcasts against [...].

    Angles are float32 whatever `dtype` is: bfloat16 cannot tell position 257 from 256.
    """
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies).reshape((1,) * positions.ndim + (-1,))
    scale = scale[..., None]
    return Rotation((jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns x [..., H]; cosines and sines broadcast against [..., H/2]."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_gradient(gradient: jax.Array, rotation: Rotation) -> jax.Array:
    """The gradient of x, given that of `rotate(x, rotation)`, in the dtype of the latter."""
    cos, sin = (table.astype(gradient.dtype) for table in rotation)
    return rotate(gradient, Rotation(cos, -sin))
