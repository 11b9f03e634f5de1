"""Qwen2: tokens in, logits out."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from qwen2_jax.attention import Context
from qwen2_jax.cache import Cache
from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Block, Embedding, Options, Projection, RMSNorm, Sequence
from qwen2_jax.moe import RouterStatistics, check_moe, load_balancing_loss
from qwen2_jax.projection import project
from qwen2_jax.remat import REMAT_POLICIES
from qwen2_jax.rope import rotations

Params = dict[str, Any]
LayerCaches = tuple[tuple[jax.Array, jax.Array], ...]


@struct.dataclass
class Output:
    """What `Qwen2` returns."""

    logits: jax.Array | None
    """[B, T, V] float32; [B, 1, V] or None if only the last or no logits were asked for."""
    hidden: jax.Array
    """[B, T, D], after the final norm."""
    cache: Cache | None
    """The cache given, with these tokens appended."""
    aux_loss: jax.Array
    """Load-balancing loss over all MoE layers and real tokens, float32; 0 for a dense model."""
    router: RouterStatistics | None = None
    """What the routers did, with a leading axis of MoE layers, for `qwen2_jax.moe.router_metrics`; None if dense."""


class Qwen2(nn.Module):
    """The decoder of the Qwen2 technical report, dense or mixture of experts, as a pure function of its parameters.

    Parameters come in two forms with the same numbers: per layer (`layers_0`, `layers_1`, ...) and stacked (`layers`,
    with a leading axis, scanned over: one layer is compiled instead of L). `stack_layers` and `unstack_layers` convert.
    """

    config: Qwen2Config
    stacked: bool | None = None
    """The form of the parameters; None takes the form of those given, and per layer at `init`."""
    dtype: jax.typing.DTypeLike | None = None
    """Of the activations and of the weights in matrix products; None takes the embedding's."""
    remat: str = "none"
    """What the backward pass keeps of each layer: a name in `qwen2_jax.remat.REMAT_POLICIES`."""
    options: Options = Options()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        logits: Literal["all", "last", "none"] = "all",
        lengths: jax.Array | None = None,
        right_padded: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
          tokens: [B, T] int32 ids; padding may hold any id.
          positions: [B, T] int32 for RoPE; by default each segment counts from 0 (with a cache: from the row's real
            tokens so far).
          segment_ids: [B, T] int32, the document of each token, 0 for padding (left or right); a token sees the earlier
            tokens of its own document. By default every token belongs to document 1.
          cache: of `empty_cache`; these tokens are appended and see what it holds. It must have room for T more.
          logits: for "all" tokens, for each row's "last" real token, or "none"; a long prefill need not hold [T, V].
          lengths: [B, T] int32, the tokens of the whole document that each token belongs to; by default those that this
            call shows. Only Dual Chunk Attention with the temperature of the whole prompt reads them, when a prompt
            comes in pieces.
          right_padded: a promise that each row is one document that begins at the first slot, with padding behind it at
            most, and that the cache is empty; kernels that take no mask can then compute it.
        """
        config = self.config
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, got {self.remat!r}")
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits must be one of all, last, none, got {logits!r}")
        check_moe(self.options.moe, self.options.capacity_factor)
        tokens = jnp.asarray(tokens, jnp.int32)
        whole_rows = right_padded or (segment_ids is None and positions is None and cache is None)
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        if positions is None:
            positions = default_positions(segment_ids, cache)
        positions = jnp.asarray(positions, jnp.int32)
        start, key_segments, key_positions, aligned = jnp.zeros((), jnp.int32), segment_ids, positions, True
        if cache is not None:
            cache.check_room(tokens.shape[1])
            aligned = cache.size == tokens.shape[1]  # it has room, so it is empty
            whole_rows = whole_rows and aligned
            start = cache.length
            key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, start))
            key_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, start))
        chunk_length = config.dual_chunk.chunk_length if config.dual_chunk else 0
        context = Context(
            query_start=start,
            key_start=jnp.zeros((), jnp.int32),
            query_segments=segment_ids,
            key_segments=key_segments,
            query_chunks=positions // chunk_length if chunk_length else None,
            key_chunks=key_positions // chunk_length if chunk_length else None,
            chunk_length=chunk_length,
            aligned=aligned,
            whole_rows=whole_rows,
        )
        if lengths is None:
            lengths = shown_lengths(segment_ids, positions)

        placement = self.options.placement
        embed = Embedding(config, self.options, name="embed")
        with jax.named_scope("embed"):
            x = placement.activation(embed(tokens, self.dtype), ("batch", "residual", "embed"))
        sequence = Sequence(rotations(config, positions, lengths, x.dtype), context, real=segment_ids != 0)

        stacked = self.has_variable("params", "layers") if self.stacked is None else self.stacked
        layers = self._scan_layers if stacked else self._unroll_layers
        x, layer_caches, statistics = layers(x, sequence, None if cache is None else cache.layers)
        if cache is not None:
            cache = Cache(layer_caches, key_segments, key_positions, length=start + tokens.shape[1])
        hidden = RMSNorm(config.hidden_size, config.rms_norm_eps, name="norm")(x)
        hidden = placement.activation(hidden, ("batch", "length", "embed"))

        with jax.named_scope("logits"):
            scores = None
            if logits != "none":
                wanted = last_real(hidden, sequence.real) if logits == "last" else hidden
                if config.tie_word_embeddings:
                    scores = embed.logits(wanted)
                else:
                    shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
                    std = config.initializer_range
                    head = Projection("BTD,VD->BTV", shape, axes, std, placement=placement, name="lm_head")
                    scores = head(wanted, dtype=jnp.float32)
                scores = placement.activation(scores, ("batch", "length", "vocab"))
        aux_loss = jnp.zeros(()) if statistics is None else load_balancing_loss(statistics)
        return Output(scores, hidden, cache, aux_loss, statistics)

    def _unroll_layers(self, x: jax.Array, sequence: Sequence, caches: LayerCaches | None):
        block = _rematerialised(self.remat, in_scan=False)
        new_caches, statistics = [], []
        for i in range(self.config.num_hidden_layers):
            cache = None if caches is None else caches[i]
            sparse = self.config.is_moe_layer(i)
            x, cache, sums = block(self.config, sparse, self.options, name=f"layers_{i}")(x, sequence, cache)
            new_caches.append(cache)
            statistics.append(sums)
        return x, tuple(new_caches), _stacked(statistics)

    def _scan_layers(self, x: jax.Array, sequence: Sequence, caches: LayerCaches | None):
        scanned = nn.scan(
            _Period,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=self.config.num_hidden_layers // self.config.layer_period,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, (caches, statistics) = scanned(self.config, self.remat, self.options, name="layers")(x, sequence, caches)
        # [periods, MoE layers of a period, ...] -> [MoE layers, ...], in the layers' order.
        return x, caches, jax.tree.map(lambda sums: sums.reshape(-1, *sums.shape[2:]), statistics)


class _Period(nn.Module):
    """The shortest run of layers that repeats: one layer, unless dense and sparse layers alternate."""

    config: Qwen2Config
    remat: str
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array, sequence: Sequence, caches: LayerCaches | None):
        block = _rematerialised(self.remat, in_scan=True)
        new_caches, statistics = [], []
        for p in range(self.config.layer_period):
            cache = None if caches is None else caches[p]
            sparse = self.config.is_moe_layer(p)
            x, cache, sums = block(self.config, sparse, self.options, name=f"block_{p}")(x, sequence, cache)
            new_caches.append(cache)
            statistics.append(sums)
        return x, (tuple(new_caches), _stacked(statistics))


def _rematerialised(remat: str, in_scan: bool) -> type[Block]:
    if remat == "none":
        return Block
    # Inside a scan the loop itself keeps XLA from merging the recomputation with the original.
    return nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=not in_scan)


def _stacked(statistics: list[RouterStatistics | None]) -> RouterStatistics | None:
    layers = [layer for layer in statistics if layer is not None]
    return jax.tree.map(lambda *sums: jnp.stack(sums), *layers) if layers else None


def forward(
    config: Qwen2Config,
    params: Params,
    tokens: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
    options: Options = Options(),
    **arguments: Any,
) -> Output:
    """`Qwen2(config, dtype=dtype, options=options).apply`, with its result's type."""
    output = Qwen2(config, dtype=dtype, options=options).apply({"params": params}, tokens, **arguments)
    assert isinstance(output, Output)
    return output


def head_of(config: Qwen2Config, params: Params) -> jax.Array:
    """[V, D]: what the logits are computed with, in tied models the embedding."""
    return params["embed"]["embedding"] if config.tie_word_embeddings else params["lm_head"]["kernel"]


def logits_of(config: Qwen2Config, params: Params, hidden: jax.Array, options: Options = Options()) -> jax.Array:
    """[B, T, V] float32: the logits that `Qwen2` computes from its last hidden states, `Output.hidden` [B, T, D]."""
    placement = options.placement.weight(("vocab", "embed"))
    return project("BTD,VD->BTV", hidden, head_of(config, params), dtype=jnp.float32, placement=placement)


def default_positions(segment_ids: jax.Array, cache: Cache | None = None) -> jax.Array:
    """[B, T] int32: each token's count within its document, which may have begun in a cache.

    Args:
      segment_ids: [B, T] int32. Padding is not counted, wherever it stands; a document's tokens follow each other.
      cache: what came before these tokens.
    """
    real = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    # The document of the latest real token up to each slot, and before it.
    latest = jax.lax.cummax(jnp.where(real, index, 0), axis=1)
    document = jnp.take_along_axis(segment_ids, latest, axis=1)
    before = jnp.concatenate([document[:, :1], document[:, :-1]], axis=1)
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real.astype(jnp.int32)
    starts = jnp.where(real & (document != before), count, 0)
    positions = count - jax.lax.cummax(starts, axis=1)
    if cache is None:
        return positions
    first = jnp.take_along_axis(segment_ids, jnp.argmax(real, axis=1, keepdims=True), axis=1)
    cached = ((cache.segment_ids == first) & (first != 0)).sum(axis=1, dtype=jnp.int32)[:, None]
    return positions + jnp.where(document == first, cached, 0)


def shown_lengths(segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, T] int32: one more than the last position [B, T] of the segment (of segment_ids [B, T]) each token is in."""
    width = segment_ids.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)[None]
    ends = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, width), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def last_real(x: jax.Array, real: jax.Array) -> jax.Array:
    """[B, 1, D]: of each row of x [B, T, D] the entry at its last true of real [B, T] (the last entry if none is)."""
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)


def init_params(config: Qwen2Config, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32, stacked: bool = False):
    """Random parameters: normal with stddev config.initializer_range, norms 1, biases 0."""

    @jax.jit
    def init(key):
        params = meta.unbox(_boxed_init(config, key))
        params = params if stacked else unstack_layers(params, config)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return init(key)


def abstract_params(config: Qwen2Config, dtype: jax.typing.DTypeLike = jnp.float32, stacked: bool = False) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s; costs no memory at any size."""
    params = _of_boxes(config, lambda box: jax.ShapeDtypeStruct(box.value.shape, dtype))
    if stacked:
        return params
    return _unstack(params, config, lambda index, leaf: jax.ShapeDtypeStruct(leaf.shape[1:], dtype))


def logical_axes(config: Qwen2Config, stacked: bool = False) -> Params:
    """The parameter tree with a tuple of logical names for each array, as ("kv_heads", "head_dim", "embed").

    Names: vocab, embed, norm, heads, kv_heads, head_dim, mlp, expert, expert_mlp, router, and layers in stacked form.
    """
    names = _of_boxes(config, lambda box: box.names)
    if stacked:
        return names
    return _unstack(names, config, lambda index, axes: axes[1:])


def stack_layers(params: Params, config: Qwen2Config) -> Params:
    """Per-layer parameters in the stacked form; leaves of `layers` gain a leading axis of L / config.layer_period."""
    period = config.layer_period
    layers = [params[f"layers_{i}"] for i in range(config.num_hidden_layers)]
    blocks = {f"block_{p}": jax.tree.map(lambda *rows: jnp.stack(rows), *layers[p::period]) for p in range(period)}
    return {**{name: tree for name, tree in params.items() if not name.startswith("layers_")}, "layers": blocks}


def unstack_layers(params: Params, config: Qwen2Config) -> Params:
    """The inverse of `stack_layers`."""
    return _unstack(params, config, lambda index, leaf: leaf[index])


def _unstack(tree: Params, config: Qwen2Config, take) -> Params:
    result = {name: child for name, child in tree.items() if name != "layers"}
    for i in range(config.num_hidden_layers):
        index, p = divmod(i, config.layer_period)
        one = functools.partial(take, index)
        result[f"layers_{i}"] = jax.tree.map(one, tree["layers"][f"block_{p}"], is_leaf=lambda x: isinstance(x, tuple))
    return result


def _boxed_init(config: Qwen2Config, key: jax.Array) -> Params:
    """Stacked parameters with their logical axes; traces one period of layers, whatever the depth."""
    return Qwen2(config, stacked=True).init(key, jnp.zeros((1, 1), jnp.int32), logits="all")["params"]


@functools.cache
def _abstract_boxed(config: Qwen2Config) -> Params:
    """Shapes and logical axes. Every placement of parameters asks for both, and tracing them takes a while."""
    return jax.eval_shape(lambda: _boxed_init(config, jax.random.key(0)))


def _of_boxes(config: Qwen2Config, take: Callable[[Any], Any]) -> Params:
    """A new tree with `take` of each stacked parameter's box, which has an abstract `value` and `names`."""
    return jax.tree.map(take, _abstract_boxed(config), is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
