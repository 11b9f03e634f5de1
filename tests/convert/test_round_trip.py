"""Hugging Face -> ours -> Hugging Face: the same tensors, bit for bit."""

import json

import numpy as np
import pytest

from convert import load_checkpoint
from convert.conversion import convert_from_hf, convert_to_hf, parse_size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["dense", "tied", "moe", "mixed"])
def test_every_tensor_comes_back(kind, shards, dtype, make_hf, tools, tmp_path):
    source = make_hf(kind, dtype=dtype, shards=shards)
    convert_from_hf(source, tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "back", shard_size=20_000 if shards > 1 else "5GB")
    assert tools.read_tensors(tmp_path / "back") == tools.read_tensors(source)
    assert (tmp_path / "back" / "model.safetensors").exists() == (shards == 1)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("kind", ["moe", "mixed"])
def test_both_spellings_of_experts(kind, make_hf, tools, tmp_path):
    """One tensor for all experts holds [gate; up] per expert; both spellings give the same model."""
    single = make_hf(kind)
    tensors = tools.random_tensors(tools.configs[kind])
    fused_tensors = {name: t for name, t in tensors.items() if ".experts." not in name}
    for name in tools.spec_shapes(tools.configs[kind], fused=True):
        if ".experts." in name:
            layer, _, last = name.rpartition(".")
            parts = ["gate_proj", "up_proj"] if last == "gate_up_proj" else ["down_proj"]
            experts = [[tensors[f"{layer}.{e}.{part}.weight"] for part in parts] for e in range(4)]
            fused_tensors[name] = np.stack([np.concatenate(matrices) for matrices in experts])
    fused = make_hf(kind, name="fused", tensors=fused_tensors)

    convert_from_hf(fused, tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "single")
    convert_to_hf(tmp_path / "ours", tmp_path / "fused_again", fused_experts=True)
    assert tools.read_tensors(tmp_path / "single") == tools.read_tensors(single)
    assert tools.read_tensors(tmp_path / "fused_again") == tools.read_tensors(fused)


def test_large_arrays_take_several_chunks(make_hf, tools, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.chunks.chunk_shape.__defaults__", (1000,))
    source = make_hf("mixed")
    convert_from_hf(source, tmp_path / "ours")
    assert len(list((tmp_path / "ours/params/layers_1.moe.experts.gate/c").rglob("0"))) > 4
    convert_to_hf(tmp_path / "ours", tmp_path / "back", shard_size=10_000)
    assert tools.read_tensors(tmp_path / "back") == tools.read_tensors(source)


@pytest.mark.parametrize("chain", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_casts(chain, make_hf, tools, tmp_path):
    before, after = chain
    source = make_hf("dense", dtype=before)
    convert_from_hf(source, tmp_path / "ours", dtype=after)
    convert_to_hf(tmp_path / "ours", tmp_path / "back")
    expected = tools.random_tensors(tools.configs["dense"], before)
    dtype = (
        np.dtype(after)
        if after != "bfloat16"
        else tools.random_tensors(tools.configs["dense"])["model.norm.weight"].dtype
    )
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[after]
    for name, (stored, _, data) in tools.read_tensors(tmp_path / "back").items():
        assert stored == short
        assert data == expected[name].astype(dtype).tobytes()
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == after
    # The other direction casts as well, to the same numbers.
    convert_from_hf(source, tmp_path / "plain")
    convert_to_hf(tmp_path / "plain", tmp_path / "late", dtype=after)
    assert tools.read_tensors(tmp_path / "late") == tools.read_tensors(tmp_path / "back")
    assert json.loads((tmp_path / "late/config.json").read_text())["torch_dtype"] == after


def test_tensors_keep_their_own_dtypes(make_hf, tools, tmp_path):
    tensors = tools.random_tensors(tools.configs["dense"])
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    source = make_hf("dense", tensors=tensors)
    convert_from_hf(source, tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "back")
    assert tools.read_tensors(tmp_path / "back") == tools.read_tensors(source)
    _, params = load_checkpoint(tmp_path / "ours")
    assert (params["norm"]["scale"].dtype, params["lm_head"]["kernel"].dtype) == (
        np.float32,
        tensors["lm_head.weight"].dtype,
    )


def test_tied_head_that_is_stored_all_the_same(make_hf, tools, tmp_path):
    tensors = tools.random_tensors(tools.configs["tied"])
    source = make_hf("tied", tensors={**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    convert_from_hf(source, tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "back")
    assert tools.read_tensors(tmp_path / "back").keys() == tensors.keys()


def test_rotary_tables_of_early_exporters_are_ignored(make_hf, tools, tmp_path):
    tensors = tools.random_tensors(tools.configs["dense"])
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    convert_from_hf(make_hf("dense", tensors={**tensors, **extra}), tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "back")
    assert tools.read_tensors(tmp_path / "back").keys() == tensors.keys()


def test_same_input_gives_the_same_files(make_hf, snapshot, tmp_path):
    source = make_hf("moe")
    convert_from_hf(source, tmp_path / "one")
    convert_from_hf(source, tmp_path / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_nonfinite_weights_are_counted_and_kept(make_hf, tools, tmp_path):
    tensors = tools.random_tensors(tools.configs["moe"], "float32")
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][3, 4:6] = np.nan, -np.inf
    tensors["model.norm.weight"][0] = np.inf
    tensors["lm_head.weight"][5, 5] = 1e6  # finite, but not as float16
    source = make_hf("moe", dtype="float32", tensors=tensors)
    report = convert_from_hf(source, tmp_path / "ours")
    assert len(report.warnings) == 1
    for part in ("3 weights are NaN", "model.layers.0.mlp.experts.2.up_proj.weight: 2", "model.norm.weight: 1"):
        assert part in report.warnings[0]
    convert_to_hf(tmp_path / "ours", tmp_path / "back")
    assert tools.read_tensors(tmp_path / "back") == tools.read_tensors(source)
    halved = convert_from_hf(source, tmp_path / "half", dtype="float16")
    assert len(halved.warnings) == 2
    assert "1 weights are too large for float16" in halved.warnings[1]
    assert "lm_head.weight: 1" in halved.warnings[1]


def test_report(make_hf, tmp_path):
    seen = []
    report = convert_from_hf(
        make_hf("dense"), tmp_path / "ours", progress=lambda done, total: seen.append((done, total))
    )
    assert (report.arrays, report.parameters, report.bytes, report.bytes_resumed) == (27, 21_792, 43_584, 0)
    assert seen[-1] == (43_584, 43_584)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(("text", "size"), [("512MB", 512e6), ("2GiB", 2**31), (17, 17), ("1.5 kb", 1500), ("3G", 3e9)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "2 potatoes", "1iB", "0", "nan"])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
