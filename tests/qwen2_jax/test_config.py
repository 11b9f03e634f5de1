"""config.json in and out: nothing lost, nothing that changes the mathematics passed over."""

import dataclasses
import json

import pytest

from qwen2_jax import Qwen2Config
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.sizes import PUBLISHED
from qwen2_jax.yarn import Yarn

HF = {  # Qwen2-7B-Instruct, as transformers 4.41 wrote it
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
MOE = {
    **HF,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [3, 5],
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}


def test_published_config_is_read():
    assert Qwen2Config.from_hf(HF) == PUBLISHED["qwen2-7b-instruct"]


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ONE_MILLION = {  # what Qwen2.5-14B-Instruct-1M has beside the shape
    **HF,
    "rope_theta": 1e7,
    "max_position_embeddings": 1010000,
    "use_mrope": False,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
}


@pytest.mark.parametrize(
    "hf",
    [
        HF,
        MOE,
        {"model_type": "qwen2"},
        {"model_type": "qwen2_moe", "num_experts": 8},
        {**HF, "rope_scaling": YARN},
        {**HF, "rope_scaling": None, "rope_parameters": None},
        {**HF, "rope_parameters": {**YARN, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False}},
        ONE_MILLION,
        {**ONE_MILLION, "rope_scaling": YARN},
    ],
)
def test_round_trip_is_lossless(hf):
    assert Qwen2Config.from_hf(hf).to_hf() == hf
    assert json.loads(json.dumps(Qwen2Config.from_hf(hf).to_hf())) == hf


def test_changes_are_written_where_the_source_has_them():
    config = dataclasses.replace(Qwen2Config.from_hf(HF), rope_theta=1e4, num_hidden_layers=2)
    assert config.to_hf() == {**HF, "rope_theta": 1e4, "num_hidden_layers": 2}
    new = {key: value for key, value in HF.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    config = dataclasses.replace(Qwen2Config.from_hf(new), rope_theta=1e4)
    assert config.to_hf() == {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "rope_type": "yarn"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},  # the trained length is then max_position_embeddings
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN},
        {"rope_scaling": {**YARN, "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None}},
    ],
)
def test_every_spelling_of_yarn(spelling):
    config = Qwen2Config.from_hf({**HF, **spelling})
    assert config.yarn == Yarn(factor=4.0, original_max_position_embeddings=32768)
    assert config.max_length == 131072
    # Turned off, changed, and back on: what is written reads as the same.
    for yarn in (None, Yarn(2.0, 32768, attention_factor=1.5), config.yarn):
        for theta in (1e6, 1e4):
            changed = dataclasses.replace(config, yarn=yarn, rope_theta=theta)
            assert Qwen2Config.from_hf(changed.to_hf()) == changed


def test_dual_chunk_attention_is_read():
    config = Qwen2Config.from_hf(ONE_MILLION)
    assert config.dual_chunk == DualChunk(262144, 8192, 262144)
    assert config.max_length is None
    changed = dataclasses.replace(config, dual_chunk=DualChunk(64, 8, 64, temperature="prompt"))
    assert Qwen2Config.from_hf(changed.to_hf()) == changed
    assert Qwen2Config.from_hf(dataclasses.replace(config, dual_chunk=None).to_hf()).dual_chunk is None


def test_both_places_of_theta_change():
    source = {**HF, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = dataclasses.replace(Qwen2Config.from_hf(source), rope_theta=1e4)
    assert Qwen2Config.from_hf(config.to_hf()).rope_theta == 1e4


def test_a_dense_model_without_bias_does_not_exist():
    with pytest.raises(ValueError, match="qkv_bias is False"):
        dataclasses.replace(Qwen2Config.from_hf(HF), qkv_bias=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_without_a_file_survive(name):
    assert Qwen2Config.from_hf(PUBLISHED[name].to_hf()) == PUBLISHED[name]


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen2Moe"])
def test_missing_keys_take_the_defaults_of_transformers(kind):
    import transformers

    theirs = getattr(transformers, f"{kind}Config")()
    ours = Qwen2Config.from_hf({"model_type": theirs.model_type})
    assert ours == Qwen2Config.from_hf(theirs.to_dict())
    assert ours.qkv_bias
    assert not ours.norm_topk_prob
    assert not ours.tie_word_embeddings
    assert ours.rope_theta == 1e4


def test_head_dim_is_a_field_of_its_own():
    config = Qwen2Config.from_hf({**HF, "head_dim": 64})
    assert (config.head_dim, PUBLISHED["qwen2-7b"].head_dim) == (64, 128)


def test_kinds_of_layers():
    config = Qwen2Config.from_hf({**MOE, "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert config.moe_layers == (1, 5, 7)
    assert config.layer_period == 8
    assert dataclasses.replace(config, mlp_only_layers=()).layer_period == 2
    assert PUBLISHED["qwen2-57b-a14b"].layer_period == 1


def dual_chunk(**block):
    return {"dual_chunk_attention_config": block}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling: rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "rope_type and type contradict"),
        ({"rope_scaling": {"type": "yarn"}}, "YaRN: factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "YaRN: factor must be at least 1 .* got 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "YaRN: factor must be a number, got '4'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "low_freq_factor": 1}},
            r"unknown keys \['low_freq_factor'\]",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1}},
            "beta_fast .* larger than beta_slow",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate must be true or false, got 1"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": None}},
            "truncate must be true or false, got null",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected an object, got 'yarn'"),
        ({"rope_scaling": {"factor": 4.0}}, "unknown keys .* to use YaRN, set rope_type to 'yarn'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta .* larger than 1 for YaRN"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"unknown keys \['factor'\]"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta has several values"),
        (dual_chunk(chunk_size=8), "dual_chunk_attention_config: local_size missing"),
        (dual_chunk(chunk_size=8, local_size=8), r"local_size \(8\) must be smaller than chunk_size \(8\)"),
        (dual_chunk(chunk_size=8, local_size=4), "local_size .4. must be smaller than the 4 tokens .* at most 3"),
        (dual_chunk(chunk_size=8.0, local_size=2), "chunk_size must be a whole number from 0 to .*, got 8.0"),
        (dual_chunk(chunk_size=2**40, local_size=2), "chunk_size must be a whole number from 0 to 1073741824"),
        (dual_chunk(chunk_size=8, local_size=-1), "local_size must be a whole number from 0 to .*, got -1"),
        (dual_chunk(chunk_size=8, local_size=2, window=3), r"unknown keys \['window'\]"),
        (dual_chunk(chunk_size=8, local_size=2, temperature="key"), "temperature must be one of query, prompt"),
        (dual_chunk(chunk_size=8, local_size=2, sparse_attention_enabled=True), "sparse attention .* not supported"),
        (
            dual_chunk(chunk_size=8, local_size=2, sparse_attention_config={"0": {}}),
            "sparse attention .* not supported",
        ),
        ({"dual_chunk_attention_config": [8, 2]}, "dual_chunk_attention_config must be an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types must be a list of .full_attention.",
        ),
        ({"qkv_bias": False}, "qkv_bias = False is not part of qwen2"),
        ({"logit_softcap": 30.0}, "unknown key 'logit_softcap'"),
        ({"num_experts": 4}, "unknown key 'num_experts'"),
        ({"model_type": None}, 'it names no model_type; write "model_type": "qwen2" or "model_type": "qwen2_moe"'),
        ({"model_type": "qwen3"}, "model_type must be one of qwen2, qwen2_moe, got 'qwen3'"),
        ({"hidden_size": "3584"}, "hidden_size must be int, got '3584'"),
        ({"hidden_size": 3584.0}, "hidden_size must be int, got 3584.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be int, got True"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool, got 1"),
        ({"vocab_size": 0}, "vocab_size must be positive and finite, got 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be positive"),
        ({"num_key_value_heads": 5}, r"num_attention_heads \(28\) is not a multiple of num_key_value_heads \(5\)"),
        ({"hidden_size": 3585}, r"hidden_size \(3585\) is not a multiple of num_attention_heads \(28\)"),
        ({"head_dim": 3}, r"head_dim \(3\) is odd"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be positive and finite, got inf"),
        ({"rope_theta": [1]}, r"rope_theta must be int or float, got \[1\]"),
        ({"layer_types": 5}, "layer_types must be a list"),
        ({"model_type": ["qwen2"]}, "model_type must be one of"),
        ({"use_mrope": True}, "use_mrope = True is not supported"),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Qwen2Config.from_hf({**HF, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 65}, r"num_experts_per_tok \(65\) is larger than num_experts \(64\)"),
        ({"mlp_only_layers": [28]}, r"mlp_only_layers \[28\] are not among the 28 layers"),
        ({"num_experts": 0}, "a dense model has model_type qwen2"),
        ({"num_experts": -1}, "num_experts must not be negative"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
        ({"mlp_only_layers": "3"}, "mlp_only_layers must be a list of layer numbers, got '3'"),
    ],
)
def test_refused_in_a_mixture(change, message):
    with pytest.raises(ValueError, match=message):
        Qwen2Config.from_hf({**MOE, **change})


def test_all_problems_come_at_once():
    with pytest.raises(ValueError, match=r"hidden_act.*use_sliding_window.*unknown key 'x'"):
        Qwen2Config.from_hf({**HF, "hidden_act": "relu", "use_sliding_window": True, "x": 1})


def test_not_an_object():
    with pytest.raises(ValueError, match="expected an object"):
        Qwen2Config.from_hf(["qwen2"])


def test_hashable_for_jit():
    assert hash(Qwen2Config.from_hf(HF)) == hash(PUBLISHED["qwen2-7b-instruct"])
