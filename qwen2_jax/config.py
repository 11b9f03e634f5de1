"""The model's configuration: what config.json says, validated once."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

MODEL_TYPES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}

# What transformers assumes where config.json is silent (configuration_qwen2.py, configuration_qwen2_moe.py).
_DEFAULTS = {
    "qwen2": dict(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "qwen2_moe": dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
}
_DEFAULT_ROPE_THETA = 10000.0

# Keys that say something about files, tokens, training or other programs, never about the forward pass.
_INERT = frozenset(
    """
    _name_or_path architectures transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id
    max_window_layers sliding_window output_router_logits output_attentions output_hidden_states return_dict
    chunk_size_feed_forward id2label label2id problem_type keys_to_ignore_at_inference
    """.split()
)

# Keys whose other values would change the mathematics: the one value that this model computes.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "attention_dropout": (0, None),
    "is_encoder_decoder": (False,),
    "rope_scaling": (None,),
    "dual_chunk_attention_config": (None,),
    "sparse_attention_config": (None,),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """A Qwen2 model's shape and constants, dense or mixture of experts; field names are those of config.json.

    Hashable and comparable, so it can be a static argument of `jax.jit`. Holds nothing about meshes, kernels or
    precision. `num_experts == 0` means a dense model. Letters of the axis legend: V vocab_size, D hidden_size,
    F intermediate_size, L num_hidden_layers, N num_attention_heads, K num_key_value_heads, H head_dim, E num_experts.

    Source: Qwen2 technical report (arXiv 2407.10671), Table 1 and section 2.2.

    Raises:
      ValueError: if the fields contradict each other; all contradictions are listed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    """Width of one head; 0 stands for hidden_size / num_attention_heads and is replaced by it."""
    max_position_embeddings: int = 32768
    rope_theta: float = _DEFAULT_ROPE_THETA
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = True
    initializer_range: float = 0.02

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    hf_json: str = dataclasses.field(default="", repr=False, compare=False)
    """The config.json this came from, so that `to_hf` loses nothing; empty if there was none."""

    def __post_init__(self):
        if self.head_dim == 0 and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("the model configuration contradicts itself: " + "; ".join(problems))

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def model_type(self) -> str:
        return "qwen2_moe" if self.is_moe else "qwen2"

    @property
    def queries_per_kv(self) -> int:
        """G, the number of query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds a sparse MoE block; the others hold a dense MLP."""
        return self.is_moe and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(filter(self.is_moe_layer, range(self.num_hidden_layers)))

    @property
    def layer_period(self) -> int:
        """The smallest P that divides L such that layers i and i + P are of one kind: 1 for every published size."""
        kinds = [self.is_moe_layer(i) for i in range(self.num_hidden_layers)]
        return next(
            period
            for period in range(1, self.num_hidden_layers + 1)
            if self.num_hidden_layers % period == 0 and kinds == kinds[:period] * (self.num_hidden_layers // period)
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Qwen2Config":
        """Reads the mapping that a config.json of transformers holds (any release from 4.37 on).

        Missing keys take transformers' defaults. Keys that this model does not know are refused, because they may
        change the mathematics.

        Raises:
          ValueError: for a model type other than qwen2 and qwen2_moe, an unknown key, or a value that is not supported
            (sliding windows, RoPE scaling, another activation, quantisation ...); every such key is named.
        """
        if not isinstance(hf, Mapping):
            raise ValueError(f"config.json: expected an object with the model's fields, got {type(hf).__name__}")
        model_type = hf.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")

        problems = [
            f"{key} = {hf[key]!r} is not supported (only {allowed[0]!r})"
            for key, allowed in _REQUIRED.items()
            if key in hf and hf[key] not in allowed
        ]
        fields = _fields_of(model_type)
        known = fields | _INERT | _REQUIRED.keys() | {"model_type", "layer_types", "rope_parameters"}
        if model_type == "qwen2":
            known |= {"qkv_bias"}
            if hf.get("qkv_bias", True) is not True:
                problems.append("qkv_bias = False is not part of qwen2: its q, k and v projections always have a bias")
        problems += [
            f"unknown key {key!r}; it may change the mathematics, remove it from config.json if it does not"
            for key in sorted(hf.keys() - known)
        ]
        if other := set(hf.get("layer_types") or ()) - {"full_attention"}:
            problems.append(f"layer_types holds {sorted(other)}; only full_attention is supported")
        values: dict[str, Any] = {
            **_DEFAULTS[model_type],
            **{key: hf[key] for key in fields & hf.keys() if hf[key] is not None},
        }
        values["rope_theta"] = _rope_theta(hf, problems)
        dense = values.get("mlp_only_layers", [])
        if not isinstance(dense, list | tuple) or not all(type(layer) is int for layer in dense):
            problems.append(f"mlp_only_layers must be a list of layer numbers, got {dense!r}")
            dense = ()
        values["mlp_only_layers"] = tuple(dense)
        if hf.get("num_key_value_heads", 0) is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if model_type == "qwen2_moe" and not values["num_experts"]:
            problems.append("num_experts = 0 in a qwen2_moe model: a dense model has model_type qwen2")
        problems += _type_problems(values)
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
        return cls(**values, hf_json=json.dumps(dict(hf)))

    def to_hf(self) -> dict[str, Any]:
        """The mapping for config.json: what `from_hf` was given, with the fields changed since then written into it."""
        if self.hf_json:
            result = json.loads(self.hf_json)
            before = dataclasses.asdict(Qwen2Config.from_hf(result))
        else:
            result = {
                "architectures": [MODEL_TYPES[self.model_type]],
                "model_type": self.model_type,
                "hidden_act": "silu",
                "attention_dropout": 0.0,
                "use_sliding_window": False,
            }
            before = {"head_dim": self.hidden_size // self.num_attention_heads, "hf_json": ""}
        if self.model_type != result["model_type"]:
            raise ValueError(
                f"the configuration was read as {result['model_type']} and is now {self.model_type}; build a new one "
                "without hf_json"
            )
        names = _fields_of(self.model_type) | {"rope_theta"}
        for name, value in dataclasses.asdict(self).items():
            if name not in names or before.get(name, _MISSING) == value:
                continue
            if name == "rope_theta" and "rope_parameters" in result:
                result["rope_parameters"] = {**(result["rope_parameters"] or {}), "rope_theta": value}
            else:
                result[name] = list(value) if isinstance(value, tuple) else value
        return result


_MISSING = object()
_MOE_FIELDS = frozenset(
    """
    num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size norm_topk_prob
    decoder_sparse_step mlp_only_layers router_aux_loss_coef qkv_bias
    """.split()
)


def _fields_of(model_type: str) -> frozenset[str]:
    names = frozenset(field.name for field in dataclasses.fields(Qwen2Config)) - {"hf_json"}
    return names if model_type == "qwen2_moe" else names - _MOE_FIELDS


def _rope_theta(hf: Mapping[str, Any], problems: list[str]) -> float:
    """RoPE's base from either spelling: `rope_theta`, or transformers 5's `rope_parameters`."""
    parameters = hf.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        problems.append(f"rope_parameters must be an object, got {parameters!r}")
        return _DEFAULT_ROPE_THETA
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type != "default":
        problems.append(f"rope_parameters: rope_type {rope_type!r} is not supported (only 'default')")
    elif unknown := sorted(parameters.keys() - {"rope_type", "type", "rope_theta"}):
        problems.append(f"rope_parameters: unknown keys {unknown}")
    thetas = {source["rope_theta"] for source in (parameters, hf) if source.get("rope_theta") is not None}
    if len(thetas) > 1:
        problems.append(f"rope_theta has two values, {sorted(thetas)}")
    return next(iter(thetas), _DEFAULT_ROPE_THETA)


def _type_problems(values: Mapping[str, Any]) -> list[str]:
    """Fields whose JSON value is of another kind than the declared one (a number as text, a float as a size)."""
    kinds: dict[Any, tuple[type, ...]] = {
        int: (int,),
        float: (int, float),
        bool: (bool,),
        tuple[int, ...]: (tuple,),
    }
    problems = []
    for field in dataclasses.fields(Qwen2Config):
        value = values.get(field.name)
        if value is None or field.name == "hf_json":
            continue
        allowed = kinds[field.type]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            problems.append(f"{field.name} must be {allowed[0].__name__}, got {value!r}")
    return problems


def _contradictions(config: Qwen2Config):
    """Yields what is wrong with the numbers, with both numbers in each message."""
    positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    positive += ["num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps"]
    if config.is_moe:
        positive += ["num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
        positive += ["decoder_sparse_step"]
    bad = [
        f"{name} must be positive, got {getattr(config, name)}" for name in positive if not getattr(config, name) > 0
    ]
    if bad:
        yield from bad
        return
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        yield f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
    if config.head_dim % 2:
        yield f"head_dim ({config.head_dim}) is odd, RoPE rotates pairs"
    if config.head_dim == config.hidden_size // heads and config.hidden_size % heads:
        yield f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads ({heads})"
    if config.num_experts < 0:
        yield f"num_experts must not be negative, got {config.num_experts}"
    if config.is_moe and config.num_experts_per_tok > config.num_experts:
        yield f"num_experts_per_tok ({config.num_experts_per_tok}) is larger than num_experts ({config.num_experts})"
    if outside := [i for i in config.mlp_only_layers if not 0 <= i < config.num_hidden_layers]:
        yield f"mlp_only_layers {outside} are not among the {config.num_hidden_layers} layers"
