"""The modules of a Qwen2 block. They own weights and call the mathematics; each weight is declared once."""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qwen2_jax import moe
from qwen2_jax.attention import Context, attend
from qwen2_jax.config import Qwen2Config
from qwen2_jax.projection import align, project
from qwen2_jax.rope import Rotation, Rotations, rotate


class Sequence(NamedTuple):
    """What every block needs to know about the tokens."""

    rotations: Rotations
    context: Context
    real: jax.Array
    """[B, T] bool: not padding."""


class Options(NamedTuple):
    """How to compute, as opposed to what: none of these changes the result beyond rounding."""

    attention: str | Callable[..., jax.Array] | None = None
    """An implementation of `qwen2_jax.attention.attend`: its name, or a function; None chooses by size."""
    moe: str = "sorted"
    """A backend of `qwen2_jax.moe`."""


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis.

    Squares are summed in float32; the result is rounded to x's dtype before the scale is applied, as in PyTorch.

    Source: RMSNorm (arXiv 1910.07467), equation 4.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * align(scale.astype(x.dtype), x)


def _weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: nn.initializers.Initializer
) -> jax.Array:
    # `param` takes the array out of the box that carries the logical axes; its annotation does not know.
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32))


class RMSNorm(nn.Module):
    width: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _weight(self, "scale", (self.width,), ("embed",), nn.initializers.ones)
        return rms_norm(x, scale, self.eps)


class Projection(nn.Module):
    """A kernel [outputs..., inputs...] and, if asked, a bias [outputs...]."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stddev: float
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        kernel = _weight(self, "kernel", self.shape, self.axes, nn.initializers.normal(self.stddev))
        bias = None
        if self.bias:
            kernel_axes, y_axes = self.equation.split(",")[1].split("->")
            outputs = sum(axis in y_axes for axis in kernel_axes)
            bias = _weight(self, "bias", self.shape[:outputs], self.axes[:outputs], nn.initializers.zeros)
        return project(self.equation, x, kernel, bias, dtype=dtype)


class Embedding(nn.Module):
    """The table [V, D], read by token id and, in tied models, multiplied for the logits."""

    config: Qwen2Config

    def setup(self):
        config = self.config
        shape, init = (config.vocab_size, config.hidden_size), nn.initializers.normal(config.initializer_range)
        self.embedding = _weight(self, "embedding", shape, ("vocab", "embed"), init)

    def __call__(self, tokens: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
        x = jnp.take(self.embedding, tokens, axis=0, mode="clip")
        return x.astype(dtype or self.embedding.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        return project("BTD,VD->BTV", x, self.embedding, dtype=jnp.float32)


class Attention(nn.Module):
    """Grouped-query attention with biased q, k and v (report, section 2.2.1)."""

    config: Qwen2Config
    options: Options = Options()

    @nn.compact
    def __call__(self, x: jax.Array, sequence: Sequence, cache: tuple[jax.Array, jax.Array] | None):
        """x [B, T, D] -> ([B, T, D], the layer's cache with T more slots)."""
        config = self.config
        width, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads, std = config.num_attention_heads, config.num_key_value_heads, config.initializer_range

        def head_projection(name: str, count: int, axis: str) -> jax.Array:
            shape, axes = (count, head_dim, width), (axis, "head_dim", "embed")
            letter = "N" if axis == "heads" else "K"
            return Projection(f"BTD,{letter}HD->BT{letter}H", shape, axes, std, config.qkv_bias, name=name)(x)

        query = head_projection("q", heads, "heads")
        cos, sin = sequence.rotations.key
        key = rotate(head_projection("k", kv_heads, "kv_heads"), Rotation(cos[:, :, None], sin[:, :, None]))
        value = head_projection("v", kv_heads, "kv_heads")
        query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
        value = checkpoint_name(value, "value")
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, S, H], as the cache holds them

        if cache is not None:
            start = (0, 0, sequence.context.query_start, 0)
            cache = (
                lax.dynamic_update_slice(cache[0], key.astype(cache[0].dtype), start),
                lax.dynamic_update_slice(cache[1], value.astype(cache[1].dtype), start),
            )
            key, value = cache[0].astype(key.dtype), cache[1].astype(value.dtype)
        with jax.named_scope("attend"):
            out = attend(query, key, value, sequence.rotations.query, sequence.context, self.options.attention)
        shape, axes = (width, heads, head_dim), ("embed", "heads", "head_dim")
        return Projection("BTNH,DNH->BTD", shape, axes, std, name="o")(out), cache


class MLP(nn.Module):
    """SwiGLU of `inner` units."""

    config: Qwen2Config
    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, std = self.config.hidden_size, self.config.initializer_range
        expand, axes = (self.inner, width), ("mlp", "embed")
        gate = checkpoint_name(Projection("BTD,FD->BTF", expand, axes, std, name="gate")(x), "gate")
        up = checkpoint_name(Projection("BTD,FD->BTF", expand, axes, std, name="up")(x), "up")
        return Projection("BTF,DF->BTD", expand[::-1], axes[::-1], std, name="down")(moe.swiglu(gate, up))


class ExpertWeights(nn.Module):
    """Every routed expert's SwiGLU, stacked over experts."""

    config: Qwen2Config

    @nn.compact
    def __call__(self) -> moe.Experts:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        expand = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        contract = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
        return moe.Experts(
            gate=_weight(self, "gate", expand, ("expert", "expert_mlp", "embed"), init),
            up=_weight(self, "up", expand, ("expert", "expert_mlp", "embed"), init),
            down=_weight(self, "down", contract, ("expert", "embed", "expert_mlp"), init),
        )


class SparseMoE(nn.Module):
    """The chosen experts' weighted sum plus the gated shared expert (report, section 2.2.2)."""

    config: Qwen2Config
    options: Options = Options()

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, moe.RouterStatistics]:
        """x [B, T, D] and real [B, T] bool -> ([B, T, D], sums over the real tokens)."""
        config = self.config
        width, std = config.hidden_size, config.initializer_range
        tokens = x.reshape(-1, width)
        with jax.named_scope("route"):
            router = Projection("XD,ED->XE", (config.num_experts, width), ("router", "embed"), std, name="router")
            routing = moe.route(router(tokens), config.num_experts_per_tok, config.norm_topk_prob)
        with jax.named_scope("experts"):
            experts = ExpertWeights(config, name="experts")()
            routed = moe.BACKENDS[self.options.moe](tokens, routing, experts).reshape(x.shape)
        with jax.named_scope("shared_expert"):
            shared = MLP(config, config.shared_expert_intermediate_size, name="shared_expert")(x)
            gate = Projection("BTD,D->BT", (width,), ("embed",), std, name="shared_expert_gate")(x)
            shared = jax.nn.sigmoid(gate)[..., None] * shared
        return routed + shared, moe.router_statistics(routing, real.ravel())


class Block(nn.Module):
    """One pre-norm layer, dense or sparse."""

    config: Qwen2Config
    sparse: bool
    options: Options = Options()

    @nn.compact
    def __call__(self, x: jax.Array, sequence: Sequence, cache: tuple[jax.Array, jax.Array] | None):
        """x [B, T, D] -> ([B, T, D], the layer's cache, the router's sums or None)."""
        config = self.config
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        attended, cache = Attention(config, self.options, name="attn")(norm(name="attn_norm")(x), sequence, cache)
        x = x + attended
        normed = norm(name="mlp_norm")(x)
        if self.sparse:
            out, statistics = SparseMoE(config, self.options, name="moe")(normed, sequence.real)
        else:
            out, statistics = MLP(config, config.intermediate_size, name="mlp")(normed), None
        return x + out, cache, statistics
