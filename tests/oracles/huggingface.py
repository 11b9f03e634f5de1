"""Tiny random models built, initialised and saved by transformers: an oracle that nobody here tuned."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

DENSE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
MOE = dict(
    DENSE,
    num_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    norm_topk_prob=False,
)

# name -> (fields of the transformers configuration, rope theta)
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "dense": (DENSE, 1e6),
    "tied": ({**DENSE, "tie_word_embeddings": True}, 1e6),
    "theta 1e4": (DENSE, 1e4),
    "theta 1e7": (DENSE, 1e7),
    "eps 1e-5": ({**DENSE, "rms_norm_eps": 1e-5}, 1e6),
    "14 heads over 2": ({**DENSE, "hidden_size": 112, "num_attention_heads": 14}, 1e6),
    "7 heads over 1": ({**DENSE, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}, 1e6),
    "5 heads, no groups": ({**DENSE, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}, 1e5),
    "wide heads": ({**DENSE, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}, 1e6),
    "heads of 2": ({**DENSE, "hidden_size": 12}, 1e4),
    "explicit head_dim": ({**DENSE, "head_dim": 20}, 1e6),
    "one layer, odd widths": ({**DENSE, "num_hidden_layers": 1, "intermediate_size": 37, "vocab_size": 61}, 1e6),
    "six layers, tied": ({**DENSE, "num_hidden_layers": 6, "tie_word_embeddings": True}, 1e6),
    "moe": (MOE, 1e6),
    "moe, normalised": ({**MOE, "norm_topk_prob": True}, 1e6),
    "moe, tied": ({**MOE, "tie_word_embeddings": True}, 1e6),
    "moe, every second layer": ({**MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2}, 1e6),
    "moe, some dense layers": ({**MOE, "num_hidden_layers": 4, "mlp_only_layers": [0, 2]}, 1e5),
    "moe, step 2 and dense 3": ({**MOE, "num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, 1e6),
    "moe, no qkv bias": ({**MOE, "qkv_bias": False, "norm_topk_prob": True}, 1e6),
    "moe, top 1 of 5": ({**MOE, "num_experts": 5, "num_experts_per_tok": 1}, 1e4),
    "moe, all of 4": ({**MOE, "num_experts": 4, "num_experts_per_tok": 4}, 1e6),
    "moe, 16 narrow experts": ({**MOE, "num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 7}, 1e7),
    "moe, eps 1e-5, 7 heads": (
        {**MOE, "rms_norm_eps": 1e-5, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7},
        1e6,
    ),
}


@dataclasses.dataclass
class Reference:
    model: Any
    folder: Path

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.from_numpy(tokens).long()).logits.float().numpy()

    def aux_loss(self, tokens: np.ndarray, real: np.ndarray | None = None) -> float:
        mask = None if real is None else torch.from_numpy(real).long()
        with torch.no_grad():
            tokens = torch.from_numpy(tokens).long()
            return self.model(tokens, attention_mask=mask, output_router_logits=True).aux_loss.item()

    def generate(self, prompt: np.ndarray, new: int, **options: Any) -> np.ndarray:
        """The tokens after prompt [T]."""
        with torch.no_grad():
            tokens = torch.from_numpy(prompt[None]).long()
            # Without a mask, transformers takes every 0 in the prompt for padding.
            options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens), **options}
            return self.model.generate(tokens, max_new_tokens=new, **options)[0, len(prompt) :].numpy()


def build(
    variant: str,
    folder: Path,
    seed: int = 0,
    fields: Mapping[str, Any] | None = None,
    rope: Mapping[str, Any] | None = None,
) -> Reference:
    """Makes a variant's model with random weights, biases and norms, and saves it to `folder`.

    `fields` replace some of the variant's, `rope` its rope_parameters.
    """
    own_fields, theta = VARIANTS[variant]
    fields = {**own_fields, **(fields or {})}
    kind = "Qwen2Moe" if "num_experts" in fields else "Qwen2"
    rope = dict(rope or {"rope_type": "default", "rope_theta": theta})
    std = 0.3 * (48 / fields["hidden_size"]) ** 0.5  # wide products must not saturate the softmax
    config = getattr(transformers, f"{kind}Config")(**fields, rope_parameters=rope, initializer_range=std)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    if kind == "Qwen2Moe":
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return Reference(model, folder)
