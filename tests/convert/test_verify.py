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
    status, out, _ = run("verify", first, tmp_path / "rounded")
    assert (status, out.split(":")[0]) == (0, "equal after rounding to bfloat16")
    status, out, _ = run("verify", tmp_path / "rounded", first, "--logits", "--json")
    assert status == 0
    assert json.loads(out)["logits"]["max_abs_diff"] > 0
    assert run("verify", first, tmp_path / "rounded", "--tolerance", 1e-6)[0] == 2
    status, out, _ = run("verify", first, tmp_path / "rounded", "--tolerance", 0.1)
    assert (status, out.split(":")[0]) == (0, "equal within 0.1")
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
    assert "3 fields of config.json (" in error
    for part in ("num_hidden_layers: 2 and 1", "rope_theta: 10000.0 and 500000.0", "embeddings: False and True"):
        assert error.count(part) == 1
    assert "only in" not in error  # it follows from config.json, which arrays there are
    status, out, error = run("verify", first, second, "--logits")
    assert (status, "logits were not compared: the configurations differ" in out) == (2, True)
    report = json.loads(run("verify", first, second, "--json", "--logits")[1])
    assert (len(report["only_in_a"]), report["logits"]) == (13, None)


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_nan_is_null_in_json_and_equal_to_itself(pair, run, make_hf):
    def change(tensors):
        tensors["model.norm.weight"][3] = np.nan
        tensors["lm_head.weight"][5, :2] = np.inf

    first, second = pair(change)
    report = strict_json(run("verify", first, second, "--json", "--logits")[1])
    difference = next(d for d in report["differences"] if d["tensor"] == "model.norm.weight")
    assert difference["values"][1] is difference["max_abs_diff"] is report["logits"]["max_abs_diff"] is None
    status, out, error = run("verify", second, second, "--json", "--logits")
    assert (status, error, strict_json(out)["logits"]["max_abs_diff"]) == (0, "", 0)


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf"])
def test_tolerances_that_are_none(tolerance, make_hf, run):
    folder = make_hf("dense")
    status, _, error = run("verify", folder, folder, "--tolerance", tolerance)
    assert (status, "--tolerance must be a number from 0 up" in error) == (2, True)


def test_progress_is_in_bytes(make_hf, run, tmp_path):
    """Of both: half the numbers' bytes are those of bfloat16, half those of float32."""
    from convert.checkpoint import open_checkpoint
    from convert.verify import compare

    first = make_hf("dense", dtype="float32")
    run("from-hf", first, tmp_path / "ours", "--dtype", "bfloat16")
    seen = []
    result = compare(open_checkpoint(first), open_checkpoint(tmp_path / "ours"), None, lambda *pair: seen.append(pair))
    assert seen[-1] == (6 * result.numbers, 6 * result.numbers)


def test_only_one_model_is_in_memory_at_a_time(make_hf, monkeypatch):
    import gc
    import weakref

    from convert import load, verify
    from convert.checkpoint import open_checkpoint

    alive, load_open = [], load.load_open

    def watched(source, dtype):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        config, params = load_open(source, dtype)
        alive.append(weakref.ref(params["embed"]["embedding"]))
        return config, params

    monkeypatch.setattr(load, "load_open", watched)
    folder = make_hf("dense")
    verify.logits_difference(open_checkpoint(folder), open_checkpoint(folder))
    assert len(alive) == 2


@pytest.mark.parametrize("logits", [[], ["--logits"]])
def test_pickles_on_request(logits, make_hf, tools, run):
    torch = pytest.importorskip("torch")
    tensors = tools.random_tensors(tools.configs["dense"], "float32")
    first = make_hf("dense", name="first", dtype="float32", tensors=tensors)
    second = make_hf("dense", name="second", dtype="float32", tensors=tensors)
    (second / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, second / "pytorch_model.bin")
    assert run("verify", first, second, *logits)[0] == 2
    assert run("verify", first, second, "--allow-pickle", *logits)[0] == 0


def test_appended_bytes_are_damage(make_hf, run, tmp_path):
    first = make_hf("dense")
    run("from-hf", first, tmp_path / "ours")
    path = tmp_path / "ours/params/norm.scale/c/0"
    path.write_bytes(path.read_bytes() + b"more")
    status, _, error = run("verify", first, tmp_path / "ours")
    assert (status, f"{path} is damaged: it has 68 bytes, expected 64" in error) == (2, True)


def test_damage_is_not_a_difference(make_hf, run, tmp_path):
    first = make_hf("dense")
    run("from-hf", first, tmp_path / "ours")
    path = tmp_path / "ours/params/norm.scale/c/0"
    path.write_bytes(bytes(len(path.read_bytes())))
    status, _, error = run("verify", first, tmp_path / "ours")
    assert (status, "array norm.scale is damaged" in error) == (2, True)
