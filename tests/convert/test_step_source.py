"""A step of a training run is a checkpoint like any other: loaded, compared, exported, and no damage goes unnoticed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_checkpoint
from convert.conversion import convert_from_hf, convert_to_hf
from sharding import make_mesh
from train.checkpoints import Checkpoints

UPCYCLE = ["--experts", 4, "--top-k", 2, "--expert-width", 24, "--shared-width", 48]


@pytest.fixture
def make_step(make_hf, tmp_path):
    """make_step("moe", ...) -> (a Hugging Face folder, a step of a run whose parameters are that model's)."""

    def make(kind, dtype="float32", mesh=None, optimizer=True, **changes):
        source = make_hf(kind, dtype=dtype, **changes)
        placed = None if mesh is None else make_mesh(mesh)
        _, params = load_checkpoint(source, mesh=placed, stacked=True)
        state = {"step": jnp.asarray(np.int32(7)), "params": params}
        if optimizer:
            state["optimizer"] = {"mu": params["norm"]["scale"] * 2}
        run = Checkpoints(tmp_path / "run", source)
        run.save(7, state)
        run.close()
        return source, tmp_path / "run/00000007"

    return make


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.mark.parametrize("kind", ["dense", "tied", "moe", "mixed"])
def test_loads_as_the_model_that_it_is(kind, make_step, monkeypatch):
    monkeypatch.setattr("convert.chunks.chunk_shape.__defaults__", (1000,))
    source, step = make_step(kind)
    for stacked in (False, True):
        config, params = load_checkpoint(step, stacked=stacked)
        expected_config, expected = load_checkpoint(source, stacked=stacked)
        assert config == expected_config
        assert_same(params, expected)


def test_from_one_mesh_onto_another(make_step, monkeypatch):
    monkeypatch.setattr("train.checkpoints.CHUNK_BYTES", 8000)  # so that large arrays are cut along their layers
    source, step = make_step("moe", mesh="fsdp=2,expert=2,tensor=2", optimizer=False)
    mesh = make_mesh("fsdp=4,tensor=2")
    _, params = load_checkpoint(step, mesh=mesh, stacked=True)
    _, expected = load_checkpoint(source, mesh=mesh, stacked=True)
    assert_same(params, expected)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, expected)


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_exports_in_the_dtype_of_the_model(kind, make_step, tmp_path, run, tools):
    """Masters in training are wider than the model; config.json says what it is published in."""
    source, step = make_step(kind)
    config = json.loads((step / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    _, params = load_checkpoint(source, stacked=True)
    other = Checkpoints(tmp_path / "other", source)
    other.save(1, {"params": params})
    other.close()
    status, out, error = run("to-hf", tmp_path / "other/00000001", tmp_path / "out")
    assert status == 0, error
    assert "\nweights are rounded from float32 to bfloat16 (--dtype float32 keeps them as they are)\n" in out
    assert {dtype for dtype, _, _ in tools.read_tensors(tmp_path / "out").values()} == {"BF16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert run("verify", tmp_path / "out", source)[0] == 0  # the wider numbers round to these

    status, out, error = run("to-hf", tmp_path / "other/00000001", tmp_path / "wide", "--dtype", "float32")
    assert (status, error, "rounded" in out) == (0, "", False)
    assert tools.read_tensors(tmp_path / "wide") == tools.read_tensors(source)
    assert json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"
    status, out, error = run("to-hf", tmp_path / "other/00000001", tmp_path / "out")
    assert (status, "complete already" in out) == (0, True)


def test_compares_with_what_it_came_from(make_step, run, tmp_path):
    source, step = make_step("dense")
    convert_from_hf(source, tmp_path / "ours")
    for other in (source, tmp_path / "ours", step):
        status, out, error = run("verify", step, other)
        assert (status, out.startswith("equal: ")) == (0, True), error


def test_experts_are_made_of_a_dense_step(make_step, run, tmp_path):
    source, step = make_step("dense")
    for name, dense in (("a", source), ("b", step)):
        assert run("upcycle", dense, tmp_path / name, *UPCYCLE)[0] == 0
    assert run("verify", tmp_path / "a", tmp_path / "b")[0] == 0


def test_says_which_step_was_meant(make_step, run, tmp_path, monkeypatch):
    _, step = make_step("dense")
    runs = tmp_path / "runs/a/checkpoints"
    for number in (7, 12, 200_000_000):
        shutil.copytree(step, runs / f"{number:08}")
    (runs / "200000000/manifest.json").unlink()  # no step yet
    for folder in (runs, runs.parent):
        for job in (["to-hf", folder, tmp_path / "out"], ["verify", folder, step]):
            status, _, error = run(*job)
            assert (status, error.count("\n")) == (2, 1)
            assert f"the run's newest step is {runs}/00000012" in error
    monkeypatch.chdir(runs.parent)
    for job in (["to-hf", "checkpoints/12", tmp_path / "out"], ["verify", "checkpoints/12", step]):
        assert "did you mean checkpoints/00000012?" in run(*job)[2]
    shutil.copytree(step, runs / "00000000")
    monkeypatch.chdir(runs)
    assert "the run's newest step is 00000012" in run("to-hf", ".", tmp_path / "out")[2]


def test_warns_of_a_tokenizer_that_transformers_would_change(make_step, run, tmp_path):
    source, _ = make_step("dense")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for name, rule, told in (("own", {"type": "WhitespaceSplit"}, True), ("none", "damaged", False)):
        (source / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": rule}))
        _, params = load_checkpoint(source, stacked=True)
        steps = Checkpoints(tmp_path / name, source)
        steps.save(1, {"params": params})
        steps.close()
        status, _, error = run("to-hf", tmp_path / name / "00000001", tmp_path / f"out-{name}")
        assert (status, "warning" in error and "does not split text as Qwen2's does" in error) == (0, told)


def test_every_flipped_bit_is_noticed_and_named(make_step):
    _, step = make_step("tied", num_hidden_layers=1)
    draw = np.random.default_rng(0)
    for file in sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size):
        parts = file.relative_to(step).parts
        name = parts[2] if len(parts) > 3 else ""
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[int(draw.integers(len(content)))] ^= 1 << int(draw.integers(8))
        file.write_bytes(damaged)
        if name and not name.startswith("params.") and file.name != "zarr.json":
            load_checkpoint(step)  # of the optimizer nothing is read
        else:
            with pytest.raises(ValueError) as caught:
                load_checkpoint(step)
            message = str(caught.value)
            assert "\n" not in message
            assert f"array {name} is damaged" in message if name else file.name in message
        file.write_bytes(content)
    load_checkpoint(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: {**hf, "hidden_size": 64}, "not as config.json has them"),
        (lambda hf: {**hf, "tie_word_embeddings": True}, "1 unknown arrays (params.lm_head.kernel)"),
        (lambda hf: {**hf, "num_hidden_layers": 3}, "not as config.json has them"),
    ],
)
def test_a_config_of_another_model(change, message, make_step, tmp_path):
    source, step = make_step("dense")
    _, params = load_checkpoint(source, stacked=True)
    config = json.loads((source / "config.json").read_text())
    shutil.rmtree(tmp_path / "run")
    (source / "config.json").write_text(json.dumps(change(config)))
    run = Checkpoints(tmp_path / "run", source)
    run.save(7, {"params": params})
    run.close()
    with pytest.raises(ValueError) as caught:
        load_checkpoint(step)
    assert message in str(caught.value) and "the training step and config.json disagree" in str(caught.value)


def test_a_torn_step_is_no_checkpoint(make_step):
    _, step = make_step("dense")
    (step / "manifest.json").unlink()
    with pytest.raises(ValueError, match="00000007 is a step whose save never came to its end; take the step before"):
        load_checkpoint(step)


def test_from_hf_says_what_it_is(make_step, tmp_path):
    _, step = make_step("dense")
    with pytest.raises(ValueError, match="is a checkpoint of ours already; `to-hf` converts it"):
        convert_from_hf(step, tmp_path / "out")


def test_memory_is_bounded(make_step, tmp_path):
    _, step = make_step("dense")
    with pytest.raises(ValueError, match="--max-host-memory 100MB is too little"):
        convert_to_hf(step, tmp_path / "out", max_host_memory="100MB")
