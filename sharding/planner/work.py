"""Floating-point operations of a step, and the bytes that they move through a device's memory at least."""

import dataclasses
import math

from qwen2_jax.config import Qwen2Config
from sharding.planner.request import Request
from sharding.planner.shapes import Weight, weights
from sharding.planner.spread import Spread

KERNELS = ("kernel", "gate", "up", "down", "embedding")
"""Last keys of weights that are multiplied with; an embedding only where it is the head too."""
HALF, SINGLE = 2, 4
"""Bytes of a bfloat16 and of a float32."""
_LANES = 128
"""Width of a TPU's vectors."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one step on all devices together; a multiply and an add are two."""

    products: float
    """With weights: 2 for each weight and token of a forward pass, 6 when training (the "6ND"); only chosen experts."""
    attention: float
    """Scores and weighted sums of causal attention, each query with the keys up to its own."""
    again: float
    """What the backward pass computes again because it was not kept, by the remat policy and by attention's kernel."""
    padding: float
    """For heads of padding, for lanes that narrow heads leave empty, and for rows that several devices compute."""

    @property
    def model(self) -> float:
        """What the mathematics needs: the numerator of the MFU."""
        return self.products + self.attention

    @property
    def total(self) -> float:
        return self.model + self.again + self.padding


def flops(spread: Spread) -> Flops:
    """Of one step of the request."""
    request = spread.request
    config = request.config
    tokens = request.batch * request.queries
    per_token = {name: 2.0 * active(config, weight) for name, weight in _products(config).items()}
    head = per_token.pop(_head(config))
    layers = sum(per_token.values())
    # Only the last token of a prompt needs logits.
    forward = tokens * layers + (tokens if request.training else request.batch) * head
    attention = request.batch * _pairs(request) * 4.0 * config.num_attention_heads * config.head_dim
    attention *= config.num_hidden_layers
    passes = 3 if request.training else 1
    again = tokens * sum(cost for name, cost in per_token.items() if _again(name, request)) if request.training else 0.0
    again_attention = 0.0
    if request.training:
        # Forward there are two products. Backward there are seven, in two kernels that both compute the scores and
        # their gradients, where four would do if everything were kept.
        again_attention = attention * (2.5 if request.remat == "full" else 1.5)
        again += again_attention
    wider = spread.query_heads * spread.tensor / config.num_attention_heads - 1
    heads = tokens * sum(cost for name, cost in per_token.items() if ".attn.q." in name or ".attn.o." in name)
    padding = passes * wider * (attention + heads)
    if request.topology.chip.kind == "tpu":
        # Scores of narrow heads are computed as wide as the lanes are.
        scores = passes * attention + again_attention
        padding += (-(-config.head_dim // _LANES) * _LANES / config.head_dim - 1) * scores
    # Devices that have different slots of a cache share the attention to it.
    shared = spread.ways("cache", request.seq) if request.task == "decode" else 1
    padding += (spread.copies - 1) * (passes * forward + again + padding)
    padding += (spread.copies / shared - 1) * passes * attention
    return Flops(passes * forward, passes * attention, again, padding)


def active(config: Qwen2Config, weight: Weight) -> float:
    """The parameters of a weight that one token meets."""
    if "expert" in weight.axes:
        return weight.size * config.num_experts_per_tok / config.num_experts
    return weight.size


def _products(config: Qwen2Config) -> dict[str, Weight]:
    """The weights that are multiplied with, by path."""
    found = {weight.path: weight for weight in weights(config) if weight.path.rpartition(".")[2] in KERNELS}
    if not config.tie_word_embeddings:
        del found["embed.embedding"]
    return found


def _head(config: Qwen2Config) -> str:
    return "embed.embedding" if config.tie_word_embeddings else "lm_head.kernel"


def _pairs(request: Request) -> float:
    """Queries times the keys they see, per row."""
    return request.seq if request.task == "decode" else request.seq * request.seq / 2


_KEPT = ("attn.q.kernel", "attn.k.kernel", "attn.v.kernel", "attn.o.kernel", "gate.kernel", "up.kernel")


def _again(path: str, request: Request) -> bool:
    """Whether the backward pass computes this product of the forward pass again.

    Routed experts always are. What a layer's last product gives is a sum that nothing is differentiated by, so a dense
    or shared `down` never is.
    """
    if ".experts." in path:
        return True
    if request.remat == "none" or path.endswith("down.kernel"):
        return False
    if request.remat in ("projections", "offload"):
        return not path.endswith(_KEPT)
    return True


def memory_traffic(spread: Spread) -> dict[str, float]:
    """Bytes that one device reads and writes in a step at least, by what they are."""
    request = spread.request
    config, training = request.config, request.training
    passes = 1 + training + (training and request.remat != "none")
    read = {"weights": 0.0, "optimizer": 0.0}
    for weight in spread.weights:
        stored = math.prod(spread.stored(weight)) * max(weight.layers, 1)
        gathered = math.prod(spread.gathered(weight)) * max(weight.layers, 1)
        if training:
            state = (SINGLE, *request.state_bytes)
            # Gradients are written once and read once, parameters and moments read and written.
            read["optimizer"] += stored * (2 * sum(state) + 2 * SINGLE)
            read["weights"] += passes * (stored * SINGLE + gathered * HALF * (1 + (gathered > stored)))
        elif weight.path != "embed.embedding" or config.tie_word_embeddings:
            read["weights"] += gathered * HALF * _met(config, weight, spread)
    read["activations"] = passes * config.num_hidden_layers * _layer_traffic(spread) * HALF
    if training:
        # Logits in float32 are written and read twice, their gradients in bfloat16 likewise.
        read["logits"] = spread.tokens * spread.vocab * 3.0 * (SINGLE + HALF)
    else:
        per_slot = 2 * config.num_hidden_layers * spread.kv_heads * config.head_dim * HALF
        read["cache"] = float(spread.rows * spread.slots * per_slot)
        read["logits"] = spread.rows * spread.vocab * 2.0 * SINGLE
    return {name: float(size) for name, size in read.items()}


def _met(config: Qwen2Config, weight: Weight, spread: Spread) -> float:
    """The part of a weight that the tokens of a step meet: of few tokens, routed at random, not every expert is."""
    if "expert" not in weight.axes:
        return 1.0
    tokens = spread.request.batch * spread.request.queries
    return 1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens


def _layer_traffic(spread: Spread) -> float:
    """Elements that the products of one layer read and write, on average over layers."""
    config = spread.request.config
    width, heads = config.hidden_size, (spread.query_heads + 2 * spread.kv_heads) * config.head_dim
    attention = 2 * width + 2 * heads + 2 * spread.query_heads * config.head_dim
    moe = len(config.moe_layers) / config.num_hidden_layers
    dense = _mlp_traffic(width, config.intermediate_size / spread.tensor)
    if config.is_moe:
        choices = config.num_experts_per_tok
        routed = choices * _mlp_traffic(width, config.moe_intermediate_size / spread.tensor)
        sparse = routed + _mlp_traffic(width, config.shared_expert_intermediate_size / spread.tensor)
        return spread.tokens * (attention + (1 - moe) * dense + moe * sparse)
    return spread.tokens * (attention + dense)


def _mlp_traffic(width: float, inner: float) -> float:
    return 2 * width + 3 * inner
