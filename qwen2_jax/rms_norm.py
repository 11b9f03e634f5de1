"""RMSNorm, with a gradient that keeps nothing but its arguments."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qwen2_jax.projection import align


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis.

    Squares are summed in float32; the result is rounded to x's dtype before the scale is applied, as in PyTorch.

    The gradient is written out because automatic differentiation would keep three arrays of x's size in float32 beside
    x, which a block keeps as it is.

    Source: RMSNorm (arXiv 1910.07467), equation 4.
    """
    return _normed(x, eps)[0].astype(x.dtype) * align(scale.astype(x.dtype), x)


def _normed(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x / rms(x) and 1 / rms(x), float32."""
    x = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse, inverse


def _rms_norm_fwd(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_bwd(eps, residuals, dy):
    x, scale = residuals
    normed, inverse = _normed(x, eps)
    dy = dy.astype(jnp.float32)
    dscale = jnp.sum(dy * normed.astype(x.dtype).astype(jnp.float32), axis=range(x.ndim - scale.ndim))
    dnormed = dy * align(scale.astype(x.dtype).astype(jnp.float32), x)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)
