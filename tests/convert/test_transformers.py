"""Folders that PyTorch and transformers wrote come back as the same files, and they load what we write."""

import filecmp
import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.torch

KINDS = ["dense", "tied", "moe"]


@pytest.fixture
def make_model(tools):
    """make(kind) -> a random transformers model; biases and norms random too."""
    import torch
    import transformers

    def make(kind, dtype=torch.bfloat16):
        torch.manual_seed(0)
        values = {key: value for key, value in tools.configs[kind].items() if key != "model_type"}
        if kind == "moe":
            model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**values))
        else:
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.to(dtype)

    return make


def same_files(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert sorted(path.name for path in b.iterdir() if path.name != ".conversion.json") == names
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_very_same_files_come_back(kind, shard_size, make_model, run, tmp_path):
    make_model(kind).save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    assert run("from-hf", tmp_path / "hf", tmp_path / "ours")[0] == 0
    assert run("to-hf", tmp_path / "ours", tmp_path / "back", "--shard-size", shard_size)[0] == 0
    same_files(tmp_path / "hf", tmp_path / "back")


def test_the_very_same_fused_files_come_back(make_model, run, tmp_path):
    make_model("moe").save_pretrained(tmp_path / "hf", save_original_format=False)
    assert run("from-hf", tmp_path / "hf", tmp_path / "ours")[0] == 0
    assert run("to-hf", tmp_path / "ours", tmp_path / "back", "--fused-experts")[0] == 0
    same_files(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("spelling", [[], ["--fused-experts"]])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_write(kind, spelling, make_hf, run, tmp_path, make_model):
    import torch
    import transformers

    source = make_hf(kind, shards=2)
    run("from-hf", source, tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "back", "--shard-size", "20KB", *spelling)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (source, tmp_path / "back")
    ]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_logits_of_a_saved_checkpoint(make_model, run, tmp_path):
    """transformers -> load_checkpoint -> save_checkpoint -> to-hf -> transformers."""
    import torch
    import transformers

    from convert import load_checkpoint, save_checkpoint

    model = make_model("moe", torch.float32)
    model.save_pretrained(tmp_path / "hf")
    save_checkpoint(tmp_path / "ours", *load_checkpoint(tmp_path / "hf", stacked=True))
    assert run("to-hf", tmp_path / "ours", tmp_path / "back")[0] == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokens = torch.arange(12)[None]
    for each in (model, loaded):
        each.eval().set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


@pytest.fixture
def pickled(make_model, tmp_path):
    """A folder as PyTorch users wrote them before safetensors: weights in one .bin file, or in two with an index."""
    import torch

    def make(kind, shards=1):
        model, folder = make_model(kind), tmp_path / "pickled"
        model.config.save_pretrained(folder)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if shards == 1:
            torch.save(state, folder / "pytorch_model.bin")
            return folder
        names, weight_map = list(state), {}
        for i in range(shards):
            torch.save({name: state[name] for name in names[i::shards]}, folder / f"pytorch_model-{i}.bin")
            weight_map.update(dict.fromkeys(names[i::shards], f"pytorch_model-{i}.bin"))
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


@pytest.mark.parametrize(("kind", "shards"), [("dense", 1), ("tied", 1), ("moe", 2)])
def test_pickles_on_request(kind, shards, pickled, make_model, tools, run, tmp_path):
    folder = pickled(kind, shards)
    status, _, error = run("from-hf", folder, tmp_path / "ours")
    assert (status, "loading a pickle can run code" in error, "--allow-pickle" in error) == (2, True, True)
    assert run("from-hf", folder, tmp_path / "ours", "--allow-pickle")[0] == 0
    make_model(kind).save_pretrained(tmp_path / "hf")
    assert run("verify", tmp_path / "hf", tmp_path / "ours")[0] == 0


@pytest.mark.parametrize("content", ["code", "text", "list", "integers"])
def test_pickles_that_are_not_weights(content, pickled, run, tmp_path):
    import torch

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = pickled("dense")
    path = folder / "pytorch_model.bin"
    match content:
        case "code":
            torch.save({"model.norm.weight": Payload()}, path)
        case "text":
            path.write_text("not a pickle")
        case "list":
            torch.save([torch.ones(3)], path)
        case "integers":
            torch.save({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, path)
    status, _, error = run("from-hf", folder, tmp_path / "ours", "--allow-pickle")
    assert (status, error.count("\n")) == (2, 1)
    assert not (tmp_path / "owned").exists()


def test_torch_too_old(pickled, run, tmp_path, monkeypatch):
    folder = pickled("dense")
    monkeypatch.setattr("convert.pickle_files.version", lambda name: "2.9.1+cpu")
    status, _, error = run("from-hf", folder, tmp_path / "ours", "--allow-pickle")
    assert (status, "takes PyTorch 2.10 or newer, found 2.9.1+cpu" in error) == (2, True)


def test_converter_needs_no_torch(make_hf, tmp_path):
    """Nor JAX's devices, nor TensorFlow's warnings: the streaming path imports neither PyTorch nor transformers."""
    code = (
        "import sys; from convert.cli import main; "
        f"assert main(['from-hf', {str(make_hf('dense'))!r}, {str(tmp_path / 'ours')!r}]) == 0; "
        "assert not {'torch', 'transformers', 'tensorflow', 'orbax', 'tensorstore'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.fromfile(tmp_path / "ours/params/norm.scale/c/0", np.uint16).shape == (32,)
