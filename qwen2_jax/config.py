"""The model's configuration: what config.json says, validated once."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.yarn import Yarn

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
    "sparse_attention_config": (None,),
    "use_mrope": (False, None),
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
    yarn: Yarn | None = None
    """`rope_scaling` (or `rope_parameters`) of type "yarn"."""
    dual_chunk: DualChunk | None = None
    """`dual_chunk_attention_config`. Together with `yarn` it is experimental: no program of Qwen's runs the two."""
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
    def max_length(self) -> int | None:
        """Tokens that a sequence may have, prompt and answer together; None if its positions have no bound.

        With Dual Chunk Attention no distance exceeds `chunk_size`, however long the sequence.
        """
        if self.dual_chunk is not None:
            return None
        return max(self.max_position_embeddings, self.yarn.max_length if self.yarn else 0)

    @property
    def reads_by_prompt_length(self) -> bool:
        """Whether the same beginning is another one in each prompt, as where a temperature follows the whole length."""
        chunks = self.dual_chunk
        return chunks is not None and chunks.original_max_position_embeddings > 0 and chunks.temperature == "prompt"

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
            (sliding windows, RoPE scaling other than YaRN, another activation ...); every such key is named.
        """
        if not isinstance(hf, Mapping):
            raise ValueError(f"config.json: expected an object with the model's fields, got {type(hf).__name__}")
        model_type = hf.get("model_type")
        if model_type is None:
            types = " or ".join(f'"model_type": "{name}"' for name in MODEL_TYPES)
            raise ValueError(f"config.json: it names no model_type; write {types} there if it describes such a model")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise ValueError(f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")

        problems = [
            f"{key} = {hf[key]!r} is not supported (only {allowed[0]!r})"
            for key, allowed in _REQUIRED.items()
            if key in hf and hf[key] not in allowed
        ]
        fields = _fields_of(model_type)
        known = fields | _INERT | _REQUIRED.keys() | {"model_type", "layer_types"}
        known |= {"rope_theta", "rope_scaling", "rope_parameters", "dual_chunk_attention_config"}
        if model_type == "qwen2":
            known |= {"qkv_bias"}
            if hf.get("qkv_bias", True) is not True:
                problems.append("qkv_bias = False is not part of qwen2: its q, k and v projections always have a bias")
        problems += [
            f"unknown key {key!r}; it may change the mathematics, remove it from config.json if it does not"
            for key in sorted(hf.keys() - known)
        ]
        kinds = hf.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            problems.append(f"layer_types must be a list of 'full_attention', no other is supported, got {kinds!r}")
        values: dict[str, Any] = {
            **_DEFAULTS[model_type],
            **{key: hf[key] for key in fields & hf.keys() if hf[key] is not None},
        }
        values["rope_theta"], values["yarn"] = _rope(hf, values.get("max_position_embeddings", 32768), problems)
        if (block := hf.get("dual_chunk_attention_config")) is not None:
            try:
                values["dual_chunk"] = DualChunk.from_hf(block)
            except ValueError as error:
                problems.append(str(error))
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
            before = vars(Qwen2Config.from_hf(result))
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
        names = _fields_of(self.model_type)
        for name, value in dataclasses.asdict(self).items():
            if name in names and before.get(name, _MISSING) != value:
                result[name] = list(value) if isinstance(value, tuple) else value
        if (before.get("rope_theta"), before.get("yarn")) != (self.rope_theta, self.yarn):
            block = None if self.yarn is None else self.yarn.to_hf()
            if result.get("rope_parameters"):  # transformers 5 keeps everything about RoPE there
                result.pop("rope_scaling", None)
                result["rope_parameters"] = {"rope_type": "default", **(block or {}), "rope_theta": self.rope_theta}
            elif block or "rope_scaling" in result:
                result["rope_scaling"] = block
            if "rope_theta" in result or "rope_parameters" not in result or not result["rope_parameters"]:
                result["rope_theta"] = self.rope_theta
        if before.get("dual_chunk") != self.dual_chunk:
            result["dual_chunk_attention_config"] = None if self.dual_chunk is None else self.dual_chunk.to_hf()
        return result


_MISSING = object()
_BLOCKS = frozenset({"hf_json", "rope_theta", "yarn", "dual_chunk"})  # fields that are not a key of config.json each
_MOE_FIELDS = frozenset(
    """
    num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size norm_topk_prob
    decoder_sparse_step mlp_only_layers router_aux_loss_coef qkv_bias
    """.split()
)


def _fields_of(model_type: str) -> frozenset[str]:
    names = frozenset(field.name for field in dataclasses.fields(Qwen2Config)) - _BLOCKS
    return names if model_type == "qwen2_moe" else names - _MOE_FIELDS


def _rope(hf: Mapping[str, Any], max_position_embeddings: int, problems: list[str]) -> tuple[float, Yarn | None]:
    """RoPE's base and YaRN, from either spelling: `rope_theta` and `rope_scaling`, or transformers 5's
    `rope_parameters`."""
    blocks = {name: hf[name] for name in ("rope_scaling", "rope_parameters") if hf.get(name)}
    yarns = {}
    for name, block in blocks.items():
        try:
            yarns[name] = _yarn(block, max_position_embeddings)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            return _DEFAULT_ROPE_THETA, None
    if len(set(yarns.values())) > 1:
        problems.append("rope_scaling and rope_parameters contradict each other; remove one")
    thetas = [source["rope_theta"] for source in (*blocks.values(), hf) if source.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        problems.append(f"rope_theta has several values, {thetas}")
    return next(iter(thetas), _DEFAULT_ROPE_THETA), next(iter(yarns.values()), None)


def _yarn(block: Any, max_position_embeddings: int) -> Yarn | None:
    if not isinstance(block, Mapping):
        raise ValueError(f"expected an object, got {block!r}")
    names = [block[key] for key in ("rope_type", "type") if block.get(key) is not None] or ["default"]
    if any(name != names[0] for name in names):
        raise ValueError(f"rope_type and type contradict each other, {names}")
    if names[0] == "yarn":
        return Yarn.from_hf(block, max_position_embeddings)
    if names[0] != "default":
        raise ValueError(f"rope_type {names[0]!r} is not supported (only 'default' and 'yarn')")
    if unknown := sorted(block.keys() - {"rope_type", "type", "rope_theta"}):
        raise ValueError(f"unknown keys {unknown} for rope_type 'default'; to use YaRN, set rope_type to 'yarn'")
    return None


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
        if value is None or field.name in _BLOCKS - {"rope_theta"}:
            continue
        allowed = kinds[field.type]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            expected = " or ".join(kind.__name__ for kind in allowed)
            problems.append(f"{field.name} must be {expected}, got {value!r}")
    return problems


# Far above every model: a damaged number must not make the tables of layers and experts endless.
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 30,
    "num_experts": 1 << 14,
    "moe_intermediate_size": 1 << 24,
    "shared_expert_intermediate_size": 1 << 24,
}


def _contradictions(config: Qwen2Config):
    """Yields what is wrong with the numbers, with both numbers in each message."""
    positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    positive += ["num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps"]
    if config.is_moe:
        positive += ["num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
        positive += ["decoder_sparse_step"]
    bad = [
        f"{name} must be positive and finite, got {getattr(config, name)}"
        for name in positive
        if not 1e-30 < getattr(config, name) < 1e30
    ]
    if bad:
        yield from bad
        return
    for name, most in _MOST.items():
        if (value := getattr(config, name)) > most:
            yield f"{name} ({value}) is larger than any model has, at most {most}"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        yield f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
    if config.head_dim % 2:
        yield f"head_dim ({config.head_dim}) is odd, RoPE rotates pairs"
    if config.head_dim == config.hidden_size // heads and config.hidden_size % heads:
        yield f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads ({heads})"
    if not config.is_moe and not config.qkv_bias:
        yield "qkv_bias is False, but a dense model's q, k and v projections always have a bias"
    if config.yarn is not None and config.rope_theta <= 1:
        yield f"rope_theta ({config.rope_theta}) must be larger than 1 for YaRN"
    if config.num_experts < 0:
        yield f"num_experts must not be negative, got {config.num_experts}"
    if config.is_moe and config.num_experts_per_tok > config.num_experts:
        yield f"num_experts_per_tok ({config.num_experts_per_tok}) is larger than num_experts ({config.num_experts})"
    if outside := [i for i in config.mlp_only_layers if not 0 <= i < config.num_hidden_layers]:
        yield f"mlp_only_layers {outside} are not among the {config.num_hidden_layers} layers"
