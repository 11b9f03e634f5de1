"""What a step sends between devices: every collective that the sharding rules ask for."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from sharding.expert_split import split_experts
from sharding.logical import ROW_AXES, axes_that_divide
from sharding.mesh import MESH_AXES
from sharding.planner.network import Kind, Network, Traffic, collective
from sharding.planner.shapes import Weight
from sharding.planner.spread import Spread
from sharding.planner.work import HALF, SINGLE


class Transfer(NamedTuple):
    """Collectives of one kind and purpose over one mesh axis."""

    what: str
    kind: Kind
    axis: str
    times: int
    """In one step."""
    size: float
    """Bytes on each device of the larger side, for each of them."""


def total(transfers: Iterable[Transfer], network: Mapping[str, Network]) -> dict[str, Traffic]:
    """What one device receives over each axis of the mesh, and how long it takes at best."""
    sizes: defaultdict[tuple[Kind, str], float] = defaultdict(float)
    for transfer in transfers:
        sizes[transfer.kind, transfer.axis] += transfer.times * transfer.size
    sums = {axis: Traffic() for axis in MESH_AXES}
    for (kind, axis), size in sizes.items():
        sums[axis] = sums[axis].plus(collective(kind, size, network[axis]))
    return sums


def transfers(spread: Spread) -> list[Transfer]:
    """Of one step; axes of one device have none."""
    found = [*_weights(spread), *_activations(spread), *_logits(spread), *_experts(spread)]
    return [transfer for transfer in found if spread.sizes[transfer.axis] > 1 and transfer.size > 0]


def _weights(spread: Spread) -> Iterator[Transfer]:
    """Weights put together over `fsdp` for products, and their gradients added up over whoever has other tokens."""
    training, decode = spread.request.training, spread.request.task == "decode"
    for weight in spread.weights:
        if "norm" in weight.axes:
            continue
        stored, gathered = math.prod(spread.stored(weight)), math.prod(spread.gathered(weight))
        count = max(weight.layers, 1)
        table = weight.path == "embed.embedding" and not spread.request.config.tie_word_embeddings
        if table:
            gathered = stored  # tokens go to the table, and their rows come back
        if spread.split_by_width(weight) and not decode:
            # Heads that do not divide over `tensor` are put together, to be repeated or padded; ahead of a decode loop.
            whole = gathered * spread.tensor
            yield Transfer("weights", "all-gather", "tensor", (2 if training else 1) * count, whole * HALF)
            if training:
                yield Transfer("gradients", "all-reduce", "tensor", count, whole * SINGLE)
        if gathered > stored:
            # A layer's weights are put together in the forward and in the backward pass.
            passes = 2 if training and weight.layers else 1
            yield Transfer("weights", "all-gather", "fsdp", passes * count, gathered * HALF)
        if training:
            if gathered > stored:
                yield Transfer("gradients", "reduce-scatter", "fsdp", count, gathered * SINGLE)
            yield from _summed(_others(weight, table or gathered > stored), count, stored * SINGLE)


def _others(weight: Weight, scattered: bool) -> tuple[str, ...]:
    """The axes whose devices have other tokens and the same part of a weight."""
    own = {"fsdp"} if scattered else set()
    if "expert" in weight.axes:
        own.add("expert")
    return tuple(axis for axis in (*ROW_AXES, "context") if axis not in own)


def _summed(axes: tuple[str, ...], count: int, size: float) -> Iterator[Transfer]:
    for axis in axes:
        yield Transfer("gradients", "all-reduce", axis, count, size)


def _activations(spread: Spread) -> Iterator[Transfer]:
    """Of attention and the dense or shared MLP, over `tensor` and `context`."""
    request, config = spread.request, spread.request.config
    layers = config.num_hidden_layers
    hidden = spread.tokens * config.hidden_size
    if request.training:
        again = request.remat != "none"
        # Gathered: what attention and the MLP read, forward and again for the gradients of their weights, and the two
        # gradients that come back. Added up: what the two give, attention's once more, and the gradients that each of
        # q, k, v, gate and up sends back.
        yield Transfer("activations", "all-gather", "tensor", (2 + 2 + 2) * layers, hidden * HALF)
        yield Transfer("activations", "reduce-scatter", "tensor", (2 + again + 5) * layers, hidden * SINGLE)
    else:
        yield Transfer("activations", "all-reduce", "tensor", 2 * layers, hidden * SINGLE)
    keys = 2 * spread.rows * request.seq * spread.kv_heads * config.head_dim
    if request.training:
        passes = 1 + (request.remat in ("full", "attention"))
        yield Transfer("keys and values", "all-gather", "context", passes * layers, keys * HALF)
        yield Transfer("keys and values", "reduce-scatter", "context", layers, keys * SINGLE)
        queries = spread.tokens * spread.query_heads * config.head_dim * HALF
        yield Transfer("queries", "all-to-all", "context", 4 * layers, queries)
    elif request.task == "prefill":
        yield Transfer("keys and values", "all-gather", "context", layers, keys * HALF)
    elif spread.ways("cache", request.seq) > 1:
        # Weighted sums of the values, the weights' sums, and the largest scores.
        sums = spread.rows * spread.query_heads * (config.head_dim + 2)
        yield Transfer("attention", "all-reduce", "context", layers, sums * SINGLE)


def _logits(spread: Spread) -> Iterator[Transfer]:
    """Of the embedding, of which each device has a part, and of the loss."""
    hidden = spread.tokens * spread.request.config.hidden_size
    yield Transfer("embedding", "all-reduce", "tensor", 1, hidden * HALF)
    yield Transfer("embedding", "all-to-all", "fsdp", 1, hidden * HALF)
    if spread.request.training:
        yield Transfer("embedding", "all-to-all", "fsdp", 1, hidden * SINGLE)
        yield Transfer("logits", "all-gather", "tensor", 2, hidden * HALF)
        yield Transfer("logits", "all-reduce", "tensor", 1, hidden * SINGLE)
        return
    # Every device chooses the next token of every row.
    size = spread.rows * spread.request.config.vocab_size * SINGLE
    yield Transfer("logits", "all-gather", "tensor", 1, size)
    for axis in axes_that_divide(spread.request.batch, ROW_AXES, spread.sizes):
        size *= spread.sizes[axis]
        yield Transfer("logits", "all-gather", axis, 1, size)


def _experts(spread: Spread) -> Iterator[Transfer]:
    """Tokens on their way to the devices of their experts and back."""
    request, config = spread.request, spread.request.config
    devices = spread.sizes["expert"]
    if not config.is_moe or devices == 1:
        return
    shape = (request.batch, request.queries, config.hidden_size)
    split = split_experts(spread.sizes, shape, config.num_experts, config.num_experts_per_tok)
    layers = len(config.moe_layers)
    # The backward pass brings tokens and gradients there, and the tokens' gradients back.
    there, back = (3, 2) if request.training else (1, 1)
    if split.variant == "exchange":
        share = _share(config.num_experts, config.num_experts // devices, config.num_experts_per_tok)
        rows = split.tokens * share * devices * config.hidden_size * HALF
        yield Transfer("expert rows", "all-to-all", "expert", (there + back) * layers, rows)
    elif split.variant == "gather":
        rows = split.tokens * devices * config.hidden_size * HALF
        yield Transfer("expert rows", "all-gather", "expert", there * layers, rows)
        yield Transfer("expert rows", "reduce-scatter", "expert", back * layers, rows)
    else:
        rows = split.tokens * config.hidden_size * SINGLE
        yield Transfer("expert rows", "all-reduce", "expert", layers, rows)


def _share(experts: int, own: int, choices: int) -> float:
    """The part of the tokens that choose any of the `own` experts of a device, if all choices are as likely."""
    return 1 - math.comb(experts - own, choices) / math.comb(experts, choices)
