"""Every weight of a model, its shape and logical axes, without building the model."""

import math
from typing import NamedTuple

from qwen2_jax.config import Qwen2Config


class Weight(NamedTuple):
    """One array of the stacked parameter tree."""

    path: str
    """Keys of the tree, joined by dots."""
    shape: tuple[int, ...]
    """Of one layer: without the axis that stacks layers."""
    axes: tuple[str, ...]
    """Logical names, one for each dim of shape."""
    layers: int
    """How many layers are stacked; 0 for what is no part of a layer, and not stacked."""

    @property
    def size(self) -> int:
        """Parameters, of all layers."""
        return math.prod(self.shape) * max(self.layers, 1)


def weights(config: Qwen2Config) -> list[Weight]:
    """What `qwen2_jax.model.abstract_params` and `logical_axes` say of the stacked tree, in arithmetic."""
    width, vocab, period = config.hidden_size, config.vocab_size, config.layer_period
    found = [Weight("embed.embedding", (vocab, width), ("vocab", "embed"), 0)]
    for p in range(period):
        block = _attention(config) + (_moe(config) if config.is_moe_layer(p) else _mlp(config, "mlp"))
        count = config.num_hidden_layers // period
        found += [Weight(f"layers.block_{p}.{path}", shape, axes, count) for path, shape, axes in block]
    found.append(Weight("norm.scale", (width,), ("norm",), 0))
    if not config.tie_word_embeddings:
        found.append(Weight("lm_head.kernel", (vocab, width), ("vocab", "embed"), 0))
    return found


def count(config: Qwen2Config) -> int:
    """All parameters."""
    return sum(weight.size for weight in weights(config))


def count_active(config: Qwen2Config) -> int:
    """The parameters that one token meets: of the routed experts, only the chosen ones."""
    idle = config.num_experts - config.num_experts_per_tok
    return count(config) - len(config.moe_layers) * idle * 3 * config.hidden_size * config.moe_intermediate_size


_Entry = tuple[str, tuple[int, ...], tuple[str, ...]]


def _attention(config: Qwen2Config) -> list[_Entry]:
    width, head_dim = config.hidden_size, config.head_dim
    entries: list[_Entry] = [
        ("attn_norm.scale", (width,), ("norm",)),
        ("mlp_norm.scale", (width,), ("norm",)),
    ]
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    for name, number in heads.items():
        axis = "heads" if name == "q" else "kv_heads"
        entries.append((f"attn.{name}.kernel", (number, head_dim, width), (axis, "head_dim", "embed")))
        if config.qkv_bias:
            entries.append((f"attn.{name}.bias", (number, head_dim), (axis, "head_dim")))
    entries.append(("attn.o.kernel", (width, heads["q"], head_dim), ("embed", "heads", "head_dim")))
    return entries


def _mlp(config: Qwen2Config, name: str) -> list[_Entry]:
    width = config.hidden_size
    inner = config.intermediate_size if name == "mlp" else config.shared_expert_intermediate_size
    return [
        (f"{name}.gate.kernel", (inner, width), ("mlp", "embed")),
        (f"{name}.up.kernel", (inner, width), ("mlp", "embed")),
        (f"{name}.down.kernel", (width, inner), ("embed", "mlp")),
    ]


def _moe(config: Qwen2Config) -> list[_Entry]:
    experts, inner, width = config.num_experts, config.moe_intermediate_size, config.hidden_size
    expand = (experts, inner, width), ("expert", "expert_mlp", "embed")
    return [
        ("moe.router.kernel", (experts, width), ("router", "embed")),
        ("moe.experts.gate", *expand),
        ("moe.experts.up", *expand),
        ("moe.experts.down", (experts, width, inner), ("expert", "embed", "expert_mlp")),
        *_mlp(config, "moe.shared_expert"),
        ("moe.shared_expert_gate.kernel", (width,), ("embed",)),
    ]
