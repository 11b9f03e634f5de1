"""The published sizes, as data.

Sources: Qwen2 technical report, Table 1, and the config.json of each repository; Qwen1.5 and Qwen2.5 relatives share
the architecture, so they load too. Parameter counts are asserted in tests by `jax.eval_shape`.
"""

import dataclasses
from typing import Any

from qwen2_jax.config import Qwen2Config


def _dense(vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, tied: bool = False, **other: Any):
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        **{"rope_theta": 1e6, "max_position_embeddings": 131072, **other},
    )


_SMALL, _LARGE = 151936, 152064  # embedding rows; 151,646 of them are real tokens

SHAPE_0_5B = _dense(_SMALL, 896, 4864, 24, 14, 2, tied=True)
SHAPE_1_5B = _dense(_SMALL, 1536, 8960, 28, 12, 2, tied=True)
SHAPE_3B = _dense(_SMALL, 2048, 11008, 36, 16, 2, tied=True)
SHAPE_7B = _dense(_LARGE, 3584, 18944, 28, 28, 4)
SHAPE_14B = _dense(_LARGE, 5120, 13824, 48, 40, 8)
SHAPE_32B = _dense(_LARGE, 5120, 27648, 64, 40, 8)
SHAPE_72B = _dense(_LARGE, 8192, 29568, 80, 64, 8)
SHAPE_57B_A14B = _dense(
    *(_SMALL, 3584, 18944, 28, 28, 4),
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=2560,
    shared_expert_intermediate_size=20480,
)
SHAPE_A2_7B = _dense(
    *(_SMALL, 2048, 5632, 24, 16, 16),
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
)

_INSTRUCT = {"max_position_embeddings": 32768}
_MATH = {"max_position_embeddings": 4096, "rope_theta": 1e4}

_VARIANTS: dict[str, tuple[Qwen2Config, dict[str, Any]]] = {
    "qwen2-0.5b": (SHAPE_0_5B, {}),
    "qwen2-0.5b-instruct": (SHAPE_0_5B, _INSTRUCT),
    "qwen2-1.5b": (SHAPE_1_5B, {}),
    "qwen2-1.5b-instruct": (SHAPE_1_5B, _INSTRUCT),
    "qwen2-7b": (SHAPE_7B, {}),
    "qwen2-7b-instruct": (SHAPE_7B, _INSTRUCT),
    "qwen2-72b": (SHAPE_72B, {"rms_norm_eps": 1e-5}),
    "qwen2-72b-instruct": (SHAPE_72B, _INSTRUCT),
    "qwen2-57b-a14b": (SHAPE_57B_A14B, {}),
    "qwen2-57b-a14b-instruct": (SHAPE_57B_A14B, _INSTRUCT),
    "qwen2-math-1.5b": (SHAPE_1_5B, _MATH),
    "qwen2-math-7b": (SHAPE_7B, _MATH),
    "qwen2-math-72b": (SHAPE_72B, _MATH),
    "qwen2.5-0.5b": (SHAPE_0_5B, _INSTRUCT),
    "qwen2.5-1.5b": (SHAPE_1_5B, {}),
    "qwen2.5-3b": (SHAPE_3B, _INSTRUCT),
    "qwen2.5-7b": (SHAPE_7B, {}),
    "qwen2.5-14b": (SHAPE_14B, {"rms_norm_eps": 1e-5}),
    "qwen2.5-32b": (SHAPE_32B, {"rms_norm_eps": 1e-5}),
    "qwen2.5-72b": (SHAPE_72B, {"rms_norm_eps": 1e-5}),
    "qwq-32b": (SHAPE_32B, {"rms_norm_eps": 1e-5}),
    "qwen1.5-moe-a2.7b": (SHAPE_A2_7B, {"max_position_embeddings": 8192}),
    "qwen1.5-moe-a2.7b-chat": (SHAPE_A2_7B, _INSTRUCT),
}

PUBLISHED: dict[str, Qwen2Config] = {
    name: dataclasses.replace(shape, **changes) for name, (shape, changes) in _VARIANTS.items()
}
"""Every published model that this architecture covers, by its lower-case name on the Hub."""


def published(name: str) -> Qwen2Config:
    """The configuration of a published model.

    Raises:
      ValueError: for a name that is not in the table; the known names are listed.
    """
    try:
        return PUBLISHED[name.lower()]
    except KeyError:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(PUBLISHED)}") from None
