"""Bytes of one device's memory at the worst moment of a step, buffer by buffer.

What lives when was read from the buffers of programs that XLA compiled for TPUs; every size follows from shapes.
"""

import math
from typing import NamedTuple

from sharding.expert_split import split_experts
from sharding.planner.request import ANSWER
from sharding.planner.shapes import Weight
from sharding.planner.spread import Spread
from sharding.planner.tiles import tiled_bytes
from sharding.planner.work import HALF, SINGLE

_CHUNK = 1024
"""Tokens per device whose logits exist at a time: `train.loss.CHUNK`."""
_COLUMNS = 4
"""Rows of a token that are added up at a time: `sharding.own_experts`."""


class Memory(NamedTuple):
    """Bytes of one device. The first four are there before a step, the rest at its worst moment."""

    parameters: int
    optimizer: int
    cache: int
    """That decoding is given."""
    inputs: int
    made: int
    """The cache that a prefill makes."""
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
        return self.made + self.gradients + self.saved + self.working

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
    state = request.state_bytes if training else ()
    tokens = sizes.array((spread.rows, spread.tokens // spread.rows), SINGLE)
    return Memory(
        parameters=single if training and request.params_bytes == SINGLE else half,
        optimizer=sum(half if size == HALF else single for size in state),
        cache=sizes.cache(spread.slots) if request.task == "decode" else 0,
        inputs=4 * tokens if training else tokens,
        made=sizes.cache(spread.slots + ANSWER) if request.task == "prefill" else 0,
        gradients=worst.gradients,
        saved=worst.saved,
        working=worst.working,
        moment=worst.name,
    )


def host_traffic(spread: Spread) -> int:
    """Bytes that one device sends to the memory of its host in a step, and fetches again."""
    if not spread.request.training or spread.request.remat != "offload":
        return 0
    sizes = _Sizes(spread)
    layers = range(spread.request.config.num_hidden_layers)
    return 2 * sum(sizes.projections(sizes.mlp_width(layer)) for layer in layers)


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
    """A prefill has its cache three times: empty, filled, and with room for the answer.

    Decoding writes into the one that it is given, unless its slots are split: then there is another to choose from.
    """
    spread, cache = sizes.spread, sizes.cache(sizes.spread.slots)
    if sizes.request.task == "prefill":
        always = 2 * cache
    else:
        always = sizes.ahead() + (cache if spread.ways("cache", sizes.request.seq) > 1 else 0)
    return [
        _Moment(0, 0, always + sizes.serving_layer(), "a layer"),
        _Moment(0, 0, always + sizes.all_logits(), "the choice of tokens"),
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

    def cache(self, slots: int) -> int:
        config, spread = self.config, self.spread
        return 2 * config.num_hidden_layers * self.array((spread.rows, spread.kv_heads, slots, config.head_dim), HALF)

    def ahead(self) -> int:
        """What XLA makes of weights ahead of the decode loop, for all its steps."""
        return sum(self.ahead_of(weight) for weight in self.spread.weights)

    def ahead_of(self, weight: Weight) -> int:
        """On TPUs copies in another layout, of experts and of what leads out of a number of heads that fills no tiles;
        anywhere key/value heads that are fewer than the devices of `tensor`, put together to be repeated."""
        if self.spread.split_by_width(weight):
            return math.prod(self.spread.gathered(weight)) * self.spread.tensor * weight.layers * HALF
        odd = weight.path.endswith("attn.o.kernel") and self.spread.query_heads % 8 not in (0, 1, 2, 4)
        return self.weight(weight, HALF) if self.tiled and (odd or "expert" in weight.axes) else 0

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
        return sum(self.saved_of(self.mlp_width(layer)) for layer in range(self.config.num_hidden_layers))

    def saved_of(self, inner: int) -> int:
        """Of one layer, whose MLP has an inner width of `inner`."""
        config, spread, remat = self.config, self.spread, self.request.remat
        kept = self.residual(HALF)
        heads = spread.query_heads * config.head_dim
        if remat == "attention":
            kept += self.tokens(heads) + self.log_sums()
        if remat in ("projections", "none"):
            kept += self.projections(inner)
        if remat == "none":
            # What the other products read.
            kept += 2 * self.tokens(config.hidden_size) + self.tokens(inner) + self.tokens(heads)
        return kept

    def projections(self, inner: int) -> int:
        """What `qwen2_jax.remat` calls so, of one layer."""
        config, spread = self.config, self.spread
        heads, keys = spread.query_heads * config.head_dim, spread.kv_heads * config.head_dim
        inside = 2 * self.tokens(heads) + 2 * self.tokens(keys) + self.log_sums() + 2 * self.tokens(inner)
        return inside + self.residual(HALF)

    def residual(self, itemsize: int) -> int:
        """An activation between layers."""
        spread = self.spread
        return self.array((spread.rows, spread.residual // spread.rows, self.config.hidden_size), itemsize)

    def log_sums(self) -> int:
        """Of attention's softmax, for each query."""
        return self.array((self.spread.query_heads, self.spread.tokens), SINGLE)

    def mlp_width(self, layer: int) -> int:
        """Inner width of a layer's MLP on this device; of routed experts nothing is ever kept."""
        config = self.config
        sparse = config.is_moe_layer(layer)
        return (config.shared_expert_intermediate_size if sparse else config.intermediate_size) // self.spread.tensor

    def loss(self) -> int:
        """The gathered head and its gradient, one chunk's logits with their gradient, hidden states and theirs."""
        config, spread = self.config, self.spread
        head = (spread.vocab, config.hidden_size)
        chunk = max(1, _CHUNK // spread.rows) * spread.rows
        logits = self.array((chunk, spread.vocab), SINGLE) + self.array((chunk, spread.vocab), HALF)
        return self.array(head, HALF) + self.array(head, SINGLE) + logits + 2 * self.tokens(config.hidden_size)

    def all_logits(self) -> int:
        """Of one token of every row, put together on each device to choose the next, and its part of them."""
        vocab = (self.request.batch, self.config.vocab_size)
        return self.array(vocab, SINGLE) + self.array((self.spread.rows, self.spread.vocab), SINGLE)

    def kinds(self) -> list[tuple[int, bool]]:
        """The inner width of each kind of layer's MLP, and whether the layer has experts."""
        kinds = {self.config.is_moe_layer(layer): layer for layer in range(self.config.layer_period)}
        return [(self.mlp_width(layer), sparse) for sparse, layer in kinds.items()]

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
        return size + max(self.backward(inner, sparse) for inner, sparse in self.kinds())

    def backward(self, inner: int, sparse: bool) -> int:
        """Of one kind of layer: what its MLP or its experts take."""
        mlp = 3 * self.tokens(inner) + self.gathered(inner * self.config.hidden_size, matrices=2)
        # One layer's on its way, another's in use.
        host = 2 * self.projections(inner) if self.request.remat == "offload" else 0
        return host + (max(mlp, self.experts() + self.shared_expert(inner)) if sparse else mlp)

    def serving_layer(self) -> int:
        """The worst moment of one layer when serving: its MLP's."""
        return max(self.forward(inner, sparse) for inner, sparse in self.kinds())

    def forward(self, inner: int, sparse: bool) -> int:
        """Of one kind of layer: what its MLP and its experts take."""
        width = self.config.hidden_size
        size = self.tokens(inner) + self.tokens(width) + (self.experts() if sparse else 0)
        return size + (self.gathered(inner * width, matrices=1) if self.spread.sizes["fsdp"] > 1 else 0)

    def gathered(self, parameters: int, matrices: int) -> int:
        """Weights put together over `fsdp`, and when training the whole gradient of one before it is scattered."""
        if self.spread.sizes["fsdp"] == 1:
            return matrices * parameters * HALF
        return parameters * (matrices * HALF + (SINGLE if self.request.training else 0))

    def experts(self) -> int:
        """Of a layer's routed experts: their weights put together, all their gradients, and a batch of rows."""
        config, spread, training = self.config, self.spread, self.request.training
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
        return weights * (HALF + SINGLE) + tokens + rows

    def shared_expert(self, inner: int) -> int:
        """What waits for its backward pass while that of the routed experts runs."""
        kernels = 2 * inner * self.config.hidden_size * HALF
        return kernels + (2 * self.tokens(inner) if self.request.remat in ("full", "attention") else 0)
