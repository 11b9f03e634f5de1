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
from qwen2_jax.heads import HeadLayout, pad_groups, repeat_heads
from qwen2_jax.placement import Placement, WeightPlacement, added_rows
from qwen2_jax.projection import project, take_as
from qwen2_jax.rms_norm import rms_norm
from qwen2_jax.rope import Rotation, Rotations, rotate
from qwen2_jax.target import target_platform


class Sequence(NamedTuple):
    """What every block needs to know about the tokens."""

    rotations: Rotations
    context: Context
    real: jax.Array
    """[B, T] bool: not padding."""


class Options(NamedTuple):
    """How to compute, as opposed to what: none of these changes the result beyond rounding."""

    attention: str | Callable[..., jax.Array] | None = None
    """An implementation of `qwen2_jax.attention.attend`: its name, or a function; None chooses by platform and
    size."""
    moe: str | Callable[..., tuple[jax.Array, jax.Array]] | None = None
    """How routed experts run: a name in `qwen2_jax.moe.BACKENDS`; None, for the platform's default; or a function
    f(x [B, T, D], routing [B, T, k], experts, capacity_factor) -> ([B, T, D], int32 scalar: choices it dropped). The
    function gets the routing before any capacity, and padding's choices are already choices of nobody."""
    capacity_factor: float | None = None
    """Of `qwen2_jax.moe.with_capacity`; None, the default, drops nothing."""
    heads: HeadLayout = HeadLayout()
    """Copies of and padding among heads, so that they divide over devices; a cache holds the copies."""
    placement: Placement = Placement()
    """What is split over devices."""


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
        scale = _weight(self, "scale", (self.width,), ("norm",), nn.initializers.ones)
        return rms_norm(x, scale, self.eps)


class Projection(nn.Module):
    """A kernel [outputs..., inputs...] and, if asked, a bias [outputs...]."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stddev: float
    bias: bool = False
    placement: Placement = Placement()
    spread: Callable[[jax.Array], jax.Array] | None = None
    """What becomes of kernel and bias before they are used: heads are repeated or padded."""

    @nn.compact
    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        kernel = _weight(self, "kernel", self.shape, self.axes, nn.initializers.normal(self.stddev))
        bias = None
        if self.bias:
            kernel_axes, y_axes = self.equation.split(",")[1].split("->")
            outputs = sum(axis in y_axes for axis in kernel_axes)
            bias = _weight(self, "bias", self.shape[:outputs], self.axes[:outputs], nn.initializers.zeros)
        if self.spread is not None:
            kernel = self.spread(self.placement.heads_together(kernel, self.axes))
            bias = None if bias is None else self.spread(self.placement.heads_together(bias, self.axes[:2]))
        return project(self.equation, x, kernel, bias, dtype=dtype, placement=self.placement.weight(self.axes))


_VOCABULARY = ("vocab", "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(placement: WeightPlacement | None, dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of table [V, D] for tokens [B, T], in `dtype`; the rows' gradients are added up in float32.

    The table is not gathered over `fsdp`: it is cheaper to look all tokens up in every device's part of the width, and
    to exchange what was found.
    """
    return jnp.take(take_as(table, dtype), tokens, axis=0, mode="clip")


def _look_up_fwd(placement, dtype, table, tokens):
    return look_up(placement, dtype, table, tokens), (table, tokens)


def _look_up_bwd(placement, dtype, residuals, dx):
    table, tokens = residuals
    rows = jnp.clip(tokens, 0, len(table) - 1)  # as they were taken
    dtable = added_rows(table.shape, rows, dx) if placement is None else placement.added_rows(table.shape, rows, dx)
    return dtable.astype(table.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Embedding(nn.Module):
    """The table [V, D], read by token id and, in tied models, multiplied for the logits."""

    config: Qwen2Config
    options: Options = Options()

    def setup(self):
        config = self.config
        shape, init = (config.vocab_size, config.hidden_size), nn.initializers.normal(config.initializer_range)
        self.embedding = _weight(self, "embedding", shape, _VOCABULARY, init)

    def __call__(self, tokens: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
        dtype = jnp.dtype(dtype or self.embedding.dtype)
        return look_up(self.options.placement.weight(_VOCABULARY), dtype, self.embedding, tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        placement = self.options.placement.weight(_VOCABULARY)
        return project("BTD,VD->BTV", x, self.embedding, dtype=jnp.float32, placement=placement)


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
        layout, placement = self.options.heads, self.options.placement
        padded = functools.partial(pad_groups, kv_heads=kv_heads, layout=layout)

        def head_projection(name: str, count: int, axis: str) -> jax.Array:
            shape, axes = (count, head_dim, width), (axis, "head_dim", "embed")
            letter = "N" if axis == "heads" else "K"
            spread = functools.partial(
                padded if axis == "heads" else functools.partial(repeat_heads, layout=layout), dim=0
            )
            equation = f"BTD,{letter}HD->BT{letter}H"
            y = Projection(equation, shape, axes, std, config.qkv_bias, placement, spread, name=name)(x)
            return placement.activation(y, ("batch", "length", axis, "head_dim"))

        query = head_projection("q", heads, "heads")
        cos, sin = sequence.rotations.key
        key = rotate(head_projection("k", kv_heads, "kv_heads"), Rotation(cos[:, :, None], sin[:, :, None]))
        value = head_projection("v", kv_heads, "kv_heads")
        query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
        value = checkpoint_name(value, "value")
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [B, K, S, H], as the cache holds them

        if cache is not None:
            if cache[0].shape[:2] != key.shape[:2]:
                # Fewer would be written beside what is there, and read as if they were all.
                raise ValueError(
                    f"the cache is for {' rows and '.join(map(str, cache[0].shape[:2]))} key/value heads, got "
                    f"{' and '.join(map(str, key.shape[:2]))}; make it by empty_cache(..., layout=options.heads)"
                )
            start = (0, 0, sequence.context.query_start, 0)
            cache = (
                lax.dynamic_update_slice(cache[0], key.astype(cache[0].dtype), start),
                lax.dynamic_update_slice(cache[1], value.astype(cache[1].dtype), start),
            )
            slots = ("batch", "kv_heads", "cache", "head_dim")
            cache = placement.activation(cache[0], slots), placement.activation(cache[1], slots)
            key, value = cache[0].astype(key.dtype), cache[1].astype(value.dtype)
        with jax.named_scope("attend"):
            out = attend(query, key, value, sequence.rotations.query, sequence.context, self.options.attention)
        shape, axes = (width, heads, head_dim), ("embed", "heads", "head_dim")
        out = placement.activation(out, ("batch", "length", "heads", "head_dim"))
        spread = functools.partial(padded, dim=1)
        return Projection("BTNH,DNH->BTD", shape, axes, std, False, placement, spread, name="o")(out), cache


class MLP(nn.Module):
    """SwiGLU of `inner` units."""

    config: Qwen2Config
    inner: int
    options: Options = Options()

    @nn.compact
    def __call__(self, x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
        """x [B, T, D] -> [B, T, D], times factor [B, T] if there is one.

        The last product takes the factor in, so that the factor's gradient does not ask for its result again.
        """
        width, std, placement = self.config.hidden_size, self.config.initializer_range, self.options.placement
        shape, axes = (self.inner, width), ("mlp", "embed")

        def expand(name: str) -> jax.Array:
            y = Projection("BTD,FD->BTF", shape, axes, std, placement=placement, name=name)(x)
            return checkpoint_name(placement.activation(y, ("batch", "length", "mlp")), name)

        hidden = moe.swiglu(expand("gate"), expand("up"))
        if factor is not None:
            hidden *= factor[..., None]
        return Projection("BTF,DF->BTD", shape[::-1], axes[::-1], std, placement=placement, name="down")(hidden)


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
        config, placement = self.config, self.options.placement
        width, std = config.hidden_size, config.initializer_range
        with jax.named_scope("route"):
            shape, axes = (config.num_experts, width), ("router", "embed")
            router = Projection("BTD,ED->BTE", shape, axes, std, placement=placement, name="router")
            routing = moe.route(router(x), config.num_experts_per_tok, config.norm_topk_prob)
        with jax.named_scope("experts"):
            experts = ExpertWeights(config, name="experts")()
            # All padding looks the same: it would fill the experts of its choice, and their capacity.
            routed, dropped = self._run_experts(x, moe.keep(routing, real[..., None]), experts)
        with jax.named_scope("shared_expert"):
            gate = Projection("BTD,D->BT", (width,), ("embed",), std, placement=placement, name="shared_expert_gate")(x)
            inner = config.shared_expert_intermediate_size
            shared = MLP(config, inner, self.options, name="shared_expert")(x, jax.nn.sigmoid(gate))
        return routed + shared, moe.router_statistics(routing, real, dropped)

    def _run_experts(self, x: jax.Array, routing: moe.Routing, experts: moe.Experts) -> tuple[jax.Array, jax.Array]:
        """The chosen experts' weighted sum [B, T, D], and how many choices were dropped."""
        chosen, capacity_factor = self.options.moe, self.options.capacity_factor
        if callable(chosen):
            return chosen(x, routing, experts, capacity_factor)
        kept = routing if capacity_factor is None else moe.with_capacity(routing, capacity_factor)
        backend = moe.backend_name(chosen, target_platform())
        return moe.moe(x, kept, experts, backend), moe.dropped_choices(routing, kept)


class Block(nn.Module):
    """One pre-norm layer, dense or sparse."""

    config: Qwen2Config
    sparse: bool
    options: Options = Options()

    @nn.compact
    def __call__(self, x: jax.Array, sequence: Sequence, cache: tuple[jax.Array, jax.Array] | None):
        """x [B, T, D] -> ([B, T, D], the layer's cache, the router's sums or None)."""
        config = self.config
        place = self.options.placement.activation
        residual, inside = ("batch", "residual", "embed"), ("batch", "length", "embed")
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        normed = place(norm(name="attn_norm")(x), inside)
        attended, cache = Attention(config, self.options, name="attn")(normed, sequence, cache)
        x = x + checkpoint_name(place(attended, residual), "output")
        normed = place(norm(name="mlp_norm")(x), inside)
        if self.sparse:
            out, statistics = SparseMoE(config, self.options, name="moe")(normed, sequence.real)
        else:
            out, statistics = MLP(config, config.intermediate_size, self.options, name="mlp")(normed), None
        return x + place(out, residual), cache, statistics
