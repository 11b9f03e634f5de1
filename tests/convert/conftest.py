"""Tiny checkpoints, written without this project's own writer: names and shapes are spelled out from the format."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.oracles.tokenizers import qwen2_rules

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    model_type="qwen2_moe",
)
CONFIGS = {
    "dense": dict(TINY, model_type="qwen2", tie_word_embeddings=False),
    "tied": dict(TINY, model_type="qwen2", tie_word_embeddings=True),
    "moe": dict(TINY, **EXPERTS),
    # Layers 1 and 3 could be sparse; 3 is not. No biases, heads wider than hidden_size / heads.
    "mixed": dict(
        TINY, **EXPERTS, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], qkv_bias=False, head_dim=16
    ),
}
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
    "added_tokens": [{"id": 2, "content": "<|endoftext|>"}],
    **qwen2_rules(),
}


def spec_shapes(hf: dict, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by the names and shapes that the Hugging Face files have."""
    d, f, v = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    h = hf.get("head_dim", d // hf["num_attention_heads"])
    q, kv = hf["num_attention_heads"] * h, hf["num_key_value_heads"] * h
    shapes = {"model.embed_tokens.weight": (v, d)}
    for n in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, d)
            if hf.get("qkv_bias", True):
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, q)
        e, fe, fs = (hf.get(key) for key in ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"))
        if e and (n + 1) % hf.get("decoder_sparse_step", 1) == 0 and n not in hf.get("mlp_only_layers", ()):
            shapes[f"{layer}.mlp.gate.weight"] = (e, d)
            if fused:
                shapes[f"{layer}.mlp.experts.gate_up_proj"] = (e, 2 * fe, d)
                shapes[f"{layer}.mlp.experts.down_proj"] = (e, d, fe)
            for j in range(0 if fused else e):
                shapes[f"{layer}.mlp.experts.{j}.gate_proj.weight"] = (fe, d)
                shapes[f"{layer}.mlp.experts.{j}.up_proj.weight"] = (fe, d)
                shapes[f"{layer}.mlp.experts.{j}.down_proj.weight"] = (d, fe)
            shapes[f"{layer}.mlp.shared_expert.gate_proj.weight"] = (fs, d)
            shapes[f"{layer}.mlp.shared_expert.up_proj.weight"] = (fs, d)
            shapes[f"{layer}.mlp.shared_expert.down_proj.weight"] = (d, fs)
            shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, d)
        else:
            shapes[f"{layer}.mlp.gate_proj.weight"] = (f, d)
            shapes[f"{layer}.mlp.up_proj.weight"] = (f, d)
            shapes[f"{layer}.mlp.down_proj.weight"] = (d, f)
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not hf.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    return shapes


def random_tensors(hf: dict, dtype: str = "bfloat16", fused: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    return {name: draw(shape, np.float32).astype(DTYPES[dtype]) for name, shape in spec_shapes(hf, fused).items()}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a file with the safetensors library."""
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def write_shards(folder: Path, tensors: dict[str, np.ndarray], count: int) -> None:
    names, weight_map = list(tensors), {}
    for i in range(count):
        shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / shard, {name: tensors[name] for name in names[i::count]})
        weight_map.update(dict.fromkeys(names[i::count], shard))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder as (dtype, shape, bytes), read with the safetensors library."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            assert name not in result
            result[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return result


@pytest.fixture
def make_hf(tmp_path) -> Callable[..., Path]:
    """make_hf("moe", dtype=..., fused=..., shards=..., tensors=..., **config changes) -> a new Hugging Face folder."""

    def make(kind: str = "dense", name="hf", dtype="bfloat16", fused=False, shards=1, tensors=None, seed=0, **changes):
        hf = {**CONFIGS[kind], "torch_dtype": dtype, **changes}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(hf))
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        tensors = random_tensors(hf, dtype, fused, seed) if tensors is None else tensors
        if shards == 1:
            write_tensors(folder / "model.safetensors", tensors)
        else:
            write_shards(folder, tensors, shards)
        return folder

    return make


@pytest.fixture
def tools():
    """This module's functions, for tests that build unusual folders."""

    class Tools:
        configs, tokenizer = CONFIGS, TOKENIZER
        spec_shapes = staticmethod(spec_shapes)
        random_tensors = staticmethod(random_tensors)
        write_tensors = staticmethod(write_tensors)
        write_shards = staticmethod(write_shards)
        read_tensors = staticmethod(read_tensors)

    return Tools


@pytest.fixture
def run(capsys):
    """run("from-hf", ...) -> (exit status, standard output, standard error) of `qwen2-jax convert`."""
    from convert.cli import main

    def command(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return command


NOTES = (".receipts.jsonl", ".conversion.json")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; notes aside, which tell of the run and not of the result."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in NOTES)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(name="snapshot")
def snapshot_fixture():
    return snapshot
