"""`qwen2-jax convert upcycle`: what it writes is the same however the work goes, and what it refuses."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from convert.conversion import convert_from_hf
from convert.files import sha256_file
from convert.native import NativeSink
from convert.upcycle import Recipe, upcycle

RECIPE = Recipe(experts=6, top_k=2, expert_width=20, shared_width=56)
OPTIONS = ["--experts", 6, "--top-k", 2, "--expert-width", 20, "--shared-width", 56]


class Crash(Exception):
    """Stands for the power cut: nothing in the converter handles it."""


def weights(folder):
    """The array digests of a checkpoint of ours."""
    return json.loads((folder / "manifest.json").read_bytes())["arrays"]


def test_report_and_files(make_hf, run, tmp_path, snapshot):
    folder = make_hf("dense")
    (folder / "README.md").write_text("a dense model")
    (folder / "LICENSE").write_text("terms")
    status, out, error = run("upcycle", folder, tmp_path / "moe", *OPTIONS, "--json")
    report = json.loads(out)
    assert (status, error) == (0, "")
    arrays = weights(tmp_path / "moe")
    sizes = {path: np.prod(entry["shape"]) for path, entry in arrays.items()}
    assert (report["arrays"], report["parameters"]) == (len(arrays), sum(sizes.values()))
    assert (report["bytes"], report["warnings"]) == (2 * sum(sizes.values()), [])
    # Per layer: 6 experts and the shared one, 3 matrices each of 32 wide units; router and shared gate.
    assert sum(size for path, size in sizes.items() if ".moe." in path) == 2 * ((6 * 20 + 56) * 3 * 32 + 6 * 32 + 32)
    carried = {name: content for name, content in snapshot(folder).items() if name in ("tokenizer.json", "LICENSE")}
    assert carried.items() <= snapshot(tmp_path / "moe").items()
    assert not (tmp_path / "moe/README.md").exists()
    config = json.loads((tmp_path / "moe/config.json").read_bytes())
    assert (config["architectures"], config["torch_dtype"]) == (["Qwen2MoeForCausalLM"], "bfloat16")
    assert "is complete already" in run("upcycle", folder, tmp_path / "moe", *OPTIONS)[1]
    status, _, error = run("upcycle", folder, tmp_path / "moe", *OPTIONS, "--seed", 1)
    assert (status, "made differently (seed: 0 then, 1 now)" in error) == (2, True)


def test_from_either_kind_of_folder(make_hf, tmp_path, snapshot):
    folder = make_hf("tied", shards=3)
    convert_from_hf(folder, tmp_path / "ours")
    for name, source in (("a", folder), ("b", tmp_path / "ours")):
        upcycle(source, tmp_path / name, RECIPE)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_another_dtype(make_hf, tmp_path):
    from convert import load_checkpoint

    folder = make_hf("dense")
    upcycle(folder, tmp_path / "stored", RECIPE)
    upcycle(folder, tmp_path / "wide", RECIPE, dtype="float32")
    stored, wide = (load_checkpoint(tmp_path / name)[1] for name in ("stored", "wide"))
    for kind in ("gate", "down"):
        a, b = (params["layers_1"]["moe"]["experts"][kind] for params in (stored, wide))
        assert (a.dtype.name, b.dtype.name) == ("bfloat16", "float32")
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b))
    assert json.loads((tmp_path / "wide/config.json").read_bytes())["torch_dtype"] == "float32"


@pytest.mark.parametrize("reinit", ["unit", "entry"])
def test_same_numbers_whatever_the_workers_and_chunks(reinit, make_hf, tmp_path, snapshot, monkeypatch):
    from convert import load_checkpoint

    folder, recipe = make_hf("dense"), Recipe(**{**vars(RECIPE), "reinit": reinit, "reinit_std": "match"})
    with monkeypatch.context() as patch:
        patch.setattr("convert.stream.cores", lambda: 1)
        upcycle(folder, tmp_path / "one", recipe)
    with monkeypatch.context() as patch:
        patch.setattr("convert.stream.cores", lambda: 8)
        upcycle(folder, tmp_path / "eight", recipe)
        patch.setattr("convert.chunks.chunk_shape.__defaults__", (700,))  # a few rows of one expert
        upcycle(folder, tmp_path / "small", recipe)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "eight")
    assert len(snapshot(tmp_path / "small")) > 2 * len(snapshot(tmp_path / "one"))
    for a, b in zip(*(leaves(load_checkpoint(tmp_path / name)[1]) for name in ("one", "small")), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(params):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_a_crash_at_any_write(make_hf, tmp_path, snapshot, monkeypatch):
    """Stops half-way through a write, each time somewhat later, going on from where the last run stopped."""
    folder = make_hf("dense")
    monkeypatch.setattr("convert.chunks.chunk_shape.__defaults__", (2000,))
    upcycle(folder, tmp_path / "whole", RECIPE)
    original = NativeSink.write
    for stop in range(0, 40, 3):
        count = 0

        def write(self, path, chunk, numbers, stop=stop):
            nonlocal count
            count += 1
            if count > stop % 7:
                original(self, path, chunk, np.full_like(numbers, 7))
                raise Crash
            original(self, path, chunk, numbers)

        monkeypatch.setattr(NativeSink, "write", write)
        with pytest.raises(Crash):
            upcycle(folder, tmp_path / "out", RECIPE)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(NativeSink, "write", original)
    report = upcycle(folder, tmp_path / "out", RECIPE)
    assert 0 < report.bytes_resumed < report.bytes
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_another_recipe_starts_afresh(make_hf, tmp_path, snapshot, monkeypatch):
    folder, other = make_hf("dense"), Recipe(**{**vars(RECIPE), "seed": 5})
    upcycle(folder, tmp_path / "whole", other)
    with monkeypatch.context() as patch:
        patch.setattr(NativeSink, "finish", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            upcycle(folder, tmp_path / "out", RECIPE)
    report = upcycle(folder, tmp_path / "out", other)
    assert (report.bytes_resumed, "seed: 0 then, 5 now" in report.warnings[0]) == (0, True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9(kills, make_hf, tmp_path, snapshot):
    folder = make_hf("dense", dtype="float32", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    options = ["--experts", 40, "--top-k", 2, "--expert-width", 100, "--shared-width", 1100]
    command = [sys.executable, "-m", "convert", "upcycle", folder, tmp_path / "out", *options]
    command = [str(word) for word in command]
    upcycle(folder, tmp_path / "whole", Recipe(experts=40, top_k=2, expert_width=100, shared_width=1100))
    receipts, draw, resumed = tmp_path / "out.partial/.receipts.jsonl", random.Random(time.time_ns()), 0
    while not (tmp_path / "out").exists():
        kills -= 1
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (receipts.exists() and receipts.read_bytes().count(b"\n") > 20):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))
        if kills >= 0:
            process.send_signal(signal.SIGKILL)
        resumed += process.wait() == -signal.SIGKILL
    assert resumed > 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_weights_that_are_not_finite(make_hf, tools, run, tmp_path):
    """They are copied with their units, counted, and do not spoil the standard deviation of new ones."""
    tensors = tools.random_tensors(tools.configs["dense"], "float32")
    tensors["model.layers.0.mlp.up_proj.weight"][:, 3] = np.inf
    folder = make_hf("dense", dtype="float32", tensors=tensors)
    status, _, error = run("upcycle", folder, tmp_path / "moe", *OPTIONS, "--reinit-std", "match")
    # Half of 120 routed units, and all of the shared expert's.
    assert (status, error.startswith(f"qwen2-jax: warning: {60 + 56} weights are NaN or infinite")) == (0, True)


BAD = {
    "no experts": (["--experts", 0], "--experts must be at least 1, got 0"),
    "no choices": (["--top-k", 0], "--top-k must be at least 1, got 0"),
    "more choices than experts": (["--top-k", 7], "--top-k must be at most --experts, 6, got 7"),
    "no units": (["--expert-width", -1], "--expert-width must be at least 1, got -1"),
    "no shared units": (["--shared-width", 0], "--shared-width must be at least 1, got 0"),
    "several": (["--top-k", 9, "--expert-width", 0], "got 0; --top-k must be at most --experts, 6, got 9"),
    "fraction": (["--reinit-fraction", 1.5], "--reinit-fraction must be from 0 to 1, got 1.5"),
    "negative fraction": (["--reinit-fraction", -0.1], "--reinit-fraction must be from 0 to 1, got -0.1"),
    "no fraction": (["--reinit-fraction", "nan"], "--reinit-fraction must be from 0 to 1, got nan"),
    "deviation": (["--reinit-std", -0.02], "--reinit-std must be 0 or more and finite, got -0.02"),
    "no deviation": (["--reinit-std", "some"], "some"),
    "router deviation": (["--router-std", "inf"], "--router-std must be 0 or more and finite, got inf"),
    "idle deviation": (["--reinit-fraction", 0, "--reinit-std", "match"], "--reinit-std is of no use with"),
    "manner": (["--reinit", "row"], "row"),
    "shared": (["--shared", "half"], "half"),
    "seed": (["--seed", -1], "--seed must be from 0 to"),
    "seed too long": (["--seed", 1 << 63], "--seed must be from 0 to"),
    "giant": (["--expert-width", 1 << 30], "moe_intermediate_size (1073741824) is larger than any model has"),
    "memory": (["--max-host-memory", "200MB"], "--max-host-memory 200MB is too little for this conversion; it takes"),
    "dtype": (["--dtype", "int4"], "int4"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options(options, message, make_hf, run, tmp_path):
    folder = make_hf("dense")
    given = dict(zip(OPTIONS[::2], OPTIONS[1::2], strict=True)) | dict(zip(options[::2], options[1::2], strict=True))
    status, out, error = run("upcycle", folder, tmp_path / "moe", *(word for pair in given.items() for word in pair))
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bad_sources(make_hf, run, tmp_path):
    for kind in ("moe", "mixed"):
        status, _, error = run("upcycle", make_hf(kind, name=kind), tmp_path / "out", *OPTIONS)
        assert (status, f"{kind}: the model has 4 experts per layer already" in error) == (2, True)
    status, _, error = run("upcycle", tmp_path / "none", tmp_path / "out", *OPTIONS)
    assert (status, "there is no folder" in error) == (2, True)
    dense = make_hf("dense", name="dense")
    (dense / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 96}}}))
    status, _, error = run("upcycle", dense, tmp_path / "out", *OPTIONS)
    assert (status, "the tokenizer has ids up to 96" in error) == (2, True)
    ours = tmp_path / "ours"
    convert_from_hf(make_hf("dense"), ours)
    manifest = json.loads((ours / "manifest.json").read_bytes())
    (ours / "tokenizer.json").write_bytes((dense / "tokenizer.json").read_bytes())
    manifest["files"]["tokenizer.json"] = sha256_file(ours / "tokenizer.json")
    (ours / "manifest.json").write_text(json.dumps(manifest))
    status, _, error = run("upcycle", ours, tmp_path / "out", *OPTIONS)
    assert (status, "the tokenizer has ids up to 96" in error) == (2, True)
    assert not list(tmp_path.glob("out*"))


def test_a_matrix_that_does_not_fit(make_hf, run, tmp_path):
    """The bound counts the dense matrix that stays in memory."""
    folder = make_hf("dense", dtype="float32", hidden_size=512, intermediate_size=8192, vocab_size=96)
    given = ["upcycle", folder, tmp_path / "moe", *OPTIONS, "--max-host-memory"]
    status, _, error = run(*given, "230MB")
    needed = error.split("it takes ")[1].strip()
    assert (status, int(needed.removesuffix("MB")) > 236) == (2, True)  # 220 of the process, 16.8 of the matrix
    assert run(*given, needed)[0] == 0
