"""Checkpoints of both kinds in memory: the right numbers, the right form, on the right devices."""

import json
import shutil
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_checkpoint, save_checkpoint
from convert.conversion import convert_from_hf
from qwen2_jax.model import abstract_params, stack_layers, unstack_layers
from sharding.rules import param_shardings

KINDS = ["dense", "tied", "moe", "mixed"]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.fixture(params=["hf", "ours"])
def folder(request, make_hf, tmp_path):
    """make(kind) -> a folder of either kind."""

    def make(kind, **options):
        source = make_hf(kind, **options)
        if request.param == "hf":
            return source
        convert_from_hf(source, tmp_path / "ours")
        return tmp_path / "ours"

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_tree_is_the_models_and_numbers_are_the_files(kind, folder, tools):
    config, params = load_checkpoint(folder(kind))
    shapes = abstract_params(config, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    tensors = tools.random_tensors(tools.configs[kind])
    layer = params["layers_1"]
    for ours, name in [
        (params["embed"]["embedding"], "model.embed_tokens.weight"),
        (layer["attn"]["k"]["kernel"], "model.layers.1.self_attn.k_proj.weight"),
        (layer["attn"]["o"]["kernel"], "model.layers.1.self_attn.o_proj.weight"),
        (layer["mlp_norm"]["scale"], "model.layers.1.post_attention_layernorm.weight"),
    ]:
        np.testing.assert_array_equal(np.asarray(ours).reshape(tensors[name].shape), tensors[name])
    if kind in ("moe", "mixed"):
        for part in ("gate", "up", "down"):
            expected = tensors[f"model.layers.1.mlp.experts.3.{part}_proj.weight"]
            np.testing.assert_array_equal(np.asarray(layer["moe"]["experts"][part][3]), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, jnp.float32, "float16"])
def test_stacked_and_cast(kind, dtype, folder):
    path = folder(kind)
    config, plain = load_checkpoint(path)
    _, params = load_checkpoint(path, dtype=dtype, stacked=True)
    expected = stack_layers(plain, config)
    if dtype is not None:
        expected = jax.tree.map(lambda x: x.astype(dtype), expected)
    assert_same(params, expected)


@pytest.mark.parametrize(
    ("stacked", "shared"),
    [(False, True), (True, False), *(pytest.param(both, both, marks=pytest.mark.slow) for both in (False, True))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sharded(kind, stacked, shared, folder, monkeypatch):
    """Also if chunks are dealt out to the devices and exchanged, as several processes do it."""
    monkeypatch.setattr("convert.chunks.chunk_shape.__defaults__", (500,))  # shards then cut through chunks
    if shared:
        monkeypatch.setattr("convert.load.is_shared", lambda *_: True)
    path = folder(kind)
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    config, plain = load_checkpoint(path, dtype=np.float32)
    _, params = load_checkpoint(path, dtype=np.float32, mesh=mesh, stacked=stacked)
    assert_same(params, stack_layers(plain, config) if stacked else plain)
    shardings = param_shardings(config, mesh, stacked)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    embedding = params["embed"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(48, 16)}


def test_only_what_the_devices_need_is_read(make_hf, monkeypatch):
    """A process whose devices hold the second half of the rows reads that half."""
    from convert import load
    from convert.checkpoint import open_checkpoint

    source = open_checkpoint(make_hf("dense"))
    read = []
    original = source.read
    monkeypatch.setattr(
        source, "read", lambda path, start, out: (read.append((start, out.size)), original(path, start, out))
    )
    monkeypatch.setattr("convert.chunks.chunk_shape.__defaults__", (16 * 32 * 2,))
    boxes = [((48, 96), (0, 16)), ((48, 64), (16, 32))]
    parts = load._read_boxes(source, ["embed.embedding"], (96, 32), boxes, np.dtype(np.float32), Counter())
    assert [parts[box].shape for box in boxes] == [(48, 16), (16, 16)]
    assert read == [(48 * 32, 512), (64 * 32, 512), (80 * 32, 512)]  # each once, though two devices need the first


def test_parameters_outlive_their_files(folder):
    path = folder("moe")
    _, params = load_checkpoint(path)
    before = jax.tree.map(lambda x: np.array(x), params)
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    shutil.rmtree(path)
    assert_same(params, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_save(kind, stacked, make_hf, tmp_path):
    source = make_hf(kind)
    config, params = load_checkpoint(source, stacked=stacked)
    save_checkpoint(tmp_path / "saved", config, params, tokenizer_from=source)
    loaded_config, loaded = load_checkpoint(tmp_path / "saved")
    assert loaded_config == config
    assert_same(loaded, unstack_layers(params, config) if stacked else params)
    assert (tmp_path / "saved/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "saved"}


def test_save_of_sharded_parameters(make_hf, tmp_path):
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    source = make_hf("moe")
    config, params = load_checkpoint(source, mesh=mesh, stacked=True)
    save_checkpoint(tmp_path / "saved", config, params)
    assert_same(load_checkpoint(tmp_path / "saved", stacked=True)[1], params)


def test_save_refuses_the_tokenizer_of_a_larger_model(make_hf, tmp_path):
    source = make_hf("dense")
    config, params = load_checkpoint(source)
    (source / "vocab.json").write_text('{"a": 96}')
    with pytest.raises(ValueError, match="ids up to 96, but the embedding has 96 rows"):
        save_checkpoint(tmp_path / "saved", config, params, tokenizer_from=source)
    assert not (tmp_path / "saved").exists()


def test_a_save_that_asks_for_a_tokenizer_gets_one(make_hf, tmp_path):
    source = make_hf("dense")
    config, params = load_checkpoint(source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="hf holds no tokenizer; expected tokenizer.json, or vocab.json and"):
        save_checkpoint(tmp_path / "saved", config, params, tokenizer_from=source)
    for nothing in (tmp_path / "nowhere", source / "config.json"):
        with pytest.raises(ValueError, match="there is no folder|is a file"):
            save_checkpoint(tmp_path / "saved", config, params, tokenizer_from=nothing)
    assert not (tmp_path / "saved").exists()


def test_save_over_the_checkpoint_that_the_tokenizer_comes_from(make_hf, tmp_path):
    config, params = load_checkpoint(make_hf("dense"))
    save_checkpoint(tmp_path / "saved", config, params, tokenizer_from=tmp_path / "hf")
    save_checkpoint(tmp_path / "saved", config, params, tokenizer_from=tmp_path / "saved", overwrite=True)
    assert (tmp_path / "saved/tokenizer.json").read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="part.partial is the source itself|part.partial holds the source"):
        shutil.copytree(tmp_path / "hf", tmp_path / "part.partial")
        save_checkpoint(tmp_path / "part", config, params, tokenizer_from=tmp_path / "part.partial")


@pytest.mark.parametrize("meshed", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_numbers_too_large_for_a_dtype_are_counted(stacked, meshed, make_hf, tools):
    tensors = tools.random_tensors(tools.configs["moe"], "float32")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, :2] = 70_000
    tensors["model.norm.weight"][1:3] = np.inf
    tensors["model.norm.weight"][5] = -1e30
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2) if meshed else None
    source = make_hf("moe", tensors=tensors, dtype="float32")
    message = (
        r"3 weights are too large for float16, now infinite: 2 arrays \((layers_1.moe.experts.up: 2|norm.scale: 1)"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        _, params = load_checkpoint(source, dtype="float16", mesh=mesh, stacked=stacked)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert np.isinf(np.asarray(params["norm"]["scale"])).sum() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(source, dtype="float32", mesh=mesh, stacked=stacked)


def test_save_refuses_other_parameters(make_hf, tmp_path):
    config, params = load_checkpoint(make_hf("dense"))
    del params["layers_0"]["mlp"]["up"]
    params["norm"]["scale"] = params["norm"]["scale"][:-1]
    params["extra"] = jnp.ones(3)
    with pytest.raises(ValueError) as caught:
        save_checkpoint(tmp_path / "saved", config, params)
    for part in ("layers_0.mlp.up.kernel: missing", "norm.scale: shape (31,), expected (32,)", "extra: unknown"):
        assert part in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_save_replaces_only_checkpoints_and_only_when_asked(make_hf, tmp_path, snapshot):
    config, params = load_checkpoint(make_hf("dense"))
    save_checkpoint(tmp_path / "saved", config, params)
    with pytest.raises(ValueError, match="exists already"):
        save_checkpoint(tmp_path / "saved", config, params)
    changed = jax.tree.map(lambda x: x + 1, params)
    save_checkpoint(tmp_path / "saved", config, changed, overwrite=True)
    assert_same(load_checkpoint(tmp_path / "saved")[1], changed)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        save_checkpoint(tmp_path / "other", config, params, overwrite=True)
    assert snapshot(tmp_path / "other") == {"thesis.txt": b"years of work"}


def test_unknown_dtype(make_hf):
    with pytest.raises(ValueError, match="weights can be bfloat16, float16, float32"):
        load_checkpoint(make_hf("dense"), dtype="int8")
    with pytest.raises(ValueError, match="weights can be"):
        load_checkpoint(make_hf(name="other"), dtype=np.float64)
