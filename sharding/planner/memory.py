"""Bytes of one device's memory at the worst moment of a step, buffer by buffer.

What lives when was read from the buffers of programs that XLA compiled for TPUs; every size follows from shapes.
"""

import math
from typing import NamedTuple

from sharding.expert_split import split_experts
from sharding.planner.request import STATE_BYTES
from sharding.planner.shapes import Weight
from sharding.planner.spread import Spread
from sharding.planner.tiles import tiled_bytes
from sharding.planner.work import HALF, SINGLE

_CHUNK = 1024
"""Tokens per device whose logits exist at a time: `train.loss.CHUNK`."""
_COLUMNS = 4
"""Rows of a token that are added up at a time: `sharding.own_experts`."""


class Memory(NamedTuple):
    """Bytes of one device. The first four live as long as the run, the rest at the worst moment of a step."""

    parameters: int
    optimizer: int
    cache: int
    inputs: int
    gradients: int
    saved: int
    """What the forward pass keeps of each layer for the backward pass, by the remat policy."""
    working: int
    """Activations and gathered weights of one layer, or logits and the gathered head."""
    moment: str
    """Which moment is the worst one."""

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.cache + self.inputs

    @property
    def temporaries(self) -> int:
        return self.gradients + self.saved + self.working

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


class _Moment(NamedTuple):
    gradients: int
    saved: int
    working: int
    name: str


def memory(spread: Spread) -> Memory:
    """Of one step of the request."""
    request = spread.request
    training = request.training
    sizes = _Sizes(spread)
    half, single = sizes.stored(HALF), sizes.stored(SINGLE)
    moments = _training(sizes) if training else _serving(sizes)
    worst = max(moments, key=lambda moment: sum(moment[:3]))
    state = STATE_BYTES[request.optimizer] if training else ()
    tokens = sizes.array((spread.rows, spread.tokens // spread.rows), SINGLE)
    return Memory(
        parameters=single if training and request.params_bytes == SINGLE else half,
        optimizer=sum(half if size == HALF else single for size in state),
        cache=0 if training else sizes.cache(),
        inputs=2 * tokens if training else tokens,
        gradients=worst.gradients,
        saved=worst.saved,
        working=worst.working,
        moment=worst.name,
    )


def host_traffic(spread: Spread) -> int:
    """Bytes that one device sends to the memory of its host in a step, and fetches again."""
    if not spread.request.training or spread.request.remat != "offload":
        return 0
    return 2 * spread.request.config.num_hidden_layers * _Sizes(spread).projections()


def _training(sizes: "_Sizes") -> list[_Moment]:
    """In the order in which they come."""
    head, layers = sizes.head_gradient(), sizes.stored(SINGLE, layers=True)
    saved = sizes.saved()
    before = sizes.stored(SINGLE) if sizes.request.accumulates else 0
    return [
        _Moment(before, saved, sizes.loss(), "the loss"),
        _Moment(before + layers + head, saved, sizes.layer(), "the backward pass of a layer"),
        _Moment(sizes.stored(SINGLE), 0, 0, "the update"),
    ]


def _serving(sizes: "_Sizes") -> list[_Moment]:
    return [
        _Moment(0, 0, sizes.serving_layer(), "a layer"),
        _Moment(0, 0, sizes.last_logits(), "the logits"),
    ]


class _Sizes:
    """Bytes of what one device holds."""

    def __init__(self, spread: Spread):
        self.spread = spread
        self.request, self.config = spread.request, spread.request.config
        self.tiled = spread.request.topology.chip.kind == "tpu"

    def array(self, shape: tuple[int, ...], itemsize: int) -> int:
        return tiled_bytes(shape, itemsize) if self.tiled else math.prod(shape) * itemsize

    def weight(self, weight: Weight, itemsize: int) -> int:
        stacked = (weight.layers,) if weight.layers else ()
        return self.array((*stacked, *self.spread.stored(weight)), itemsize)

    def stored(self, itemsize: int, layers: bool = False) -> int:
        """All weights' parts, or only those of layers."""
        return sum(self.weight(weight, itemsize) for weight in self.spread.weights if weight.layers or not layers)

    def cache(self) -> int:
        config, spread = self.config, self.spread
        shape = (config.num_hidden_layers, spread.rows, spread.kv_heads, spread.slots, config.head_dim)
        return 2 * self.array(shape, HALF)

    def head_gradient(self) -> int:
        """Of what the logits are computed with, as it is stored; the loss computes it."""
        name = "embed.embedding" if self.config.tie_word_embeddings else "lm_head.kernel"
        return next(self.weight(weight, SINGLE) for weight in self.spread.weights if weight.path == name)

    def tokens(self, width: int, itemsize: int = HALF) -> int:
        """An activation of `width` for every token of the device, inside a layer."""
        rows = self.spread.rows
        return self.array((rows, self.spread.tokens // rows, width), itemsize)

    def saved(self) -> int:
        """What stays on the device, over all layers."""
        config, spread, remat = self.config, self.spread, self.request.remat
        kept = self.residual(HALF)
        heads = spread.query_heads * config.head_dim
        if remat == "attention":
            kept += self.tokens(heads) + self.log_sums()
        if remat in ("projections", "none"):
            kept += self.projections()
        if remat == "none":
            # What the other products and the norms read.
            kept += 2 * self.tokens(config.hidden_size) + sum(self.tokens(width) for width in self.mlp_widths())
            kept += 3 * self.residual(SINGLE)
        return config.num_hidden_layers * kept

    def projections(self) -> int:
        """What `qwen2_jax.remat` calls so, of one layer."""
        config, spread = self.config, self.spread
        heads, keys = spread.query_heads * config.head_dim, spread.kv_heads * config.head_dim
        inner = sum(self.tokens(width) for width in self.mlp_widths())
        return 2 * self.tokens(heads) + 2 * self.tokens(keys) + self.log_sums() + 2 * inner

    def residual(self, itemsize: int) -> int:
        """An activation between layers."""
        spread = self.spread
        return self.array((spread.rows, spread.residual // spread.rows, self.config.hidden_size), itemsize)

    def log_sums(self) -> int:
        """Of attention's softmax, for each query."""
        return self.array((self.spread.query_heads, self.spread.tokens), SINGLE)

    def mlp_widths(self) -> list[int]:
        """Inner width of a layer's MLP on this device; of routed experts nothing is ever kept."""
        config = self.config
        inner = config.shared_expert_intermediate_size if config.is_moe else config.intermediate_size
        return [inner // self.spread.tensor]

    def loss(self) -> int:
        """The gathered head and its gradient, one chunk's logits, hidden states and their gradients."""
        config, spread = self.config, self.spread
        head = (spread.vocab, config.hidden_size)
        chunk = max(1, _CHUNK // spread.rows) * spread.rows
        logits = self.array((chunk, spread.vocab), SINGLE)
        return self.array(head, HALF) + self.array(head, SINGLE) + logits + 2 * self.tokens(config.hidden_size)

    def last_logits(self) -> int:
        """Of one token per row."""
        return 2 * self.array((self.spread.rows, self.spread.vocab), SINGLE)

    def layer(self) -> int:
        """The worst moment of one layer when training: its MLP's, or its experts', backward pass."""
        config, spread = self.config, self.spread
        width = config.hidden_size
        heads, keys = spread.query_heads * config.head_dim, spread.kv_heads * config.head_dim
        # Normed input, gradients on their way in and out, and the sum over `tensor` before it is scattered.
        size = 4 * self.tokens(width)
        if spread.tensor > 1:
            size += self.tokens(width, SINGLE)
        if self.request.remat in ("full", "attention"):
            size += 2 * self.tokens(heads) + 2 * self.tokens(keys)
        inner = max(self.mlp_widths())
        mlp = 3 * self.tokens(inner) + self.gathered(inner * width, matrices=2)
        if self.request.remat == "offload":
            size += 2 * self.projections()  # one layer's on its way, another's in use
        return size + max(mlp, self.experts())

    def serving_layer(self) -> int:
        """The worst moment of one layer when serving: its MLP's. The loop over layers writes a cache of its own."""
        inner, width = max(self.mlp_widths()), self.config.hidden_size
        size = self.cache() + self.tokens(inner) + self.tokens(width)
        if self.spread.sizes["fsdp"] > 1:
            size += self.gathered(inner * width, matrices=1)
        return size + self.experts()

    def gathered(self, parameters: int, matrices: int) -> int:
        """Weights put together over `fsdp`, and when training the whole gradient of one before it is scattered."""
        if self.spread.sizes["fsdp"] == 1:
            return matrices * parameters * HALF
        return parameters * (matrices * HALF + (SINGLE if self.request.training else 0))

    def experts(self) -> int:
        """Of a layer's routed experts: their weights put together, all their gradients, and a batch of rows."""
        config, spread, training = self.config, self.spread, self.request.training
        if not config.is_moe:
            return 0
        width, inner = config.hidden_size, config.moe_intermediate_size // spread.tensor
        shape = (self.request.batch, self.request.queries, width)
        split = split_experts(spread.sizes, shape, config.num_experts, config.num_experts_per_tok)
        devices = spread.sizes["expert"]
        own = config.num_experts // devices
        arrived = split.tokens if split.variant == "stay" else devices * (split.slots or split.tokens)
        weights = 3 * own * width * inner
        if not training:
            return weights * HALF + arrived * width * (HALF + SINGLE) + split.batch * (2 * width + 3 * inner) * HALF
        # Of tokens that arrived: they, what their results are multiplied by, their gradients' sums in float32 with the
        # rows that are added at a time, and the sums of earlier batches.
        earlier = split.most_batches > 1 or split.most_rounds > 1
        columns = min(_COLUMNS, config.num_experts_per_tok, own)
        tokens = arrived * width * ((2 + columns) * HALF + (1 + earlier) * SINGLE)
        rows = split.batch * 3 * (width + inner) * HALF
        return weights * (HALF + SINGLE) + tokens + rows + self.shared_expert()

    def shared_expert(self) -> int:
        """What waits for its backward pass while that of the routed experts runs."""
        (inner,) = self.mlp_widths()
        kernels = 2 * inner * self.config.hidden_size * HALF
        return kernels + (2 * self.tokens(inner) if self.request.remat in ("full", "attention") else 0)
