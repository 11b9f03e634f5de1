"""Comparing two checkpoints."""

import json

import numpy as np
import pytest


@pytest.fixture
def pair(make_hf, tools):
    """make(change) -> two folders, the second with changed tensors."""

    def make(change, kind="moe", dtype="float32", **options):
        tensors = tools.random_tensors(tools.configs[kind], dtype)
        first = make_hf(kind, name="first", dtype=dtype, tensors=tensors)
        changed = {name: tensor.copy() for name, tensor in tensors.items()}
        change(changed)
        return first, make_hf(kind, name="second", dtype=dtype, tensors=changed, **options)

    return make


def test_equal_across_kinds_and_spellings(make_hf, run, tmp_path):
    first = make_hf("moe", shards=3)
    run("from-hf", first, tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "fused", "--fused-experts")
    for a, b in [(first, tmp_path / "ours"), (tmp_path / "ours", first), (first, tmp_path / "fused")]:
        status, out, error = run("verify", a, b)
        assert (status, error) == (0, "")
        assert "equal: 37 arrays, 29,792 parameters" in out
    status, out, error = run("verify", first, tmp_path / "fused", "--logits")
    assert (status, error) == (0, "")
    assert "largest difference 0, the same most likely tokens" in out


def test_first_difference_is_named(pair, run):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.3.down_proj.weight"][7, 5] += 0.5
        tensors["model.layers.1.mlp.experts.3.down_proj.weight"][9, 1] -= 2
        tensors["model.norm.weight"][3] = np.nan

    first, second = pair(change)
    status, out, error = run("verify", first, second)
    assert status == 2
    assert "2 of 37 arrays, first model.layers.1.mlp.experts.3.down_proj.weight[7, 5] is" in error
    assert "2 numbers of layers_1.moe.experts.down differ, by up to 2)" in error
    assert "model.norm.weight[3]" in out and "by up to nan" in out
    status, out, _ = run("verify", first, second, "--json")
    report = json.loads(out)
    assert (status, report["equal"], report["compared"]) == (2, False, 37)
    assert [d["tensor"] for d in report["differences"]] == [
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "model.norm.weight",
    ]
    assert report["differences"][0]["index"] == [7, 5]


def test_bits_or_tolerance(pair, run):
    def change(tensors):
        tensors["lm_head.weight"][0, 0] = 0.0
        tensors["lm_head.weight"][0, 1] += 1e-3

    first, second = pair(lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), -0.0))
    assert run("verify", first, second)[0] == 2
    assert run("verify", first, second, "--tolerance", 3)[0] == 0
    for path in (first, second):
        path.rename(path.with_name(f"old_{path.name}"))
    first, second = pair(change)
    assert run("verify", first, second, "--tolerance", 1e-4)[0] == 2


def test_rounding_counts_as_equal_only_where_it_is_exact(make_hf, run, tmp_path, tools):
    first = make_hf("dense", dtype="float32")
    run("from-hf", first, tmp_path / "rounded", "--dtype", "bfloat16")
    assert run("verify", first, tmp_path / "rounded")[0] == 0
    status, out, _ = run("verify", tmp_path / "rounded", first, "--logits", "--json")
    assert status == 0
    assert json.loads(out)["logits"]["max_abs_diff"] > 0
    assert run("verify", first, tmp_path / "rounded", "--tolerance", 1e-6)[0] == 2
    assert run("verify", first, tmp_path / "rounded", "--tolerance", 0.1)[0] == 0
    truncated = {
        name: t.astype("f4").view("u4") & 0xFFFF0000
        for name, t in tools.random_tensors(tools.configs["dense"], "float32").items()
    }
    second = make_hf("dense", name="cut", dtype="float32", tensors={n: t.view("f4") for n, t in truncated.items()})
    run("from-hf", second, tmp_path / "cut_bf16", "--dtype", "bfloat16")
    assert run("verify", first, tmp_path / "cut_bf16")[0] == 2


def test_different_models(make_hf, run):
    first, second = make_hf("dense", name="a"), make_hf("tied", name="b", num_hidden_layers=1, rope_theta=5e5)
    status, _, error = run("verify", first, second)
    assert status == 2
    assert error.count("\n") == 1
    for part in ("13 arrays only in the first", "num_hidden_layers: 2 and 1", "rope_theta: 10000.0 and 500000.0"):
        assert part in error


def test_damage_is_not_a_difference(make_hf, run, tmp_path):
    first = make_hf("dense")
    run("from-hf", first, tmp_path / "ours")
    path = tmp_path / "ours/params/norm.scale/c/0"
    path.write_bytes(bytes(len(path.read_bytes())))
    status, _, error = run("verify", first, tmp_path / "ours")
    assert (status, "array norm.scale is damaged" in error) == (2, True)
