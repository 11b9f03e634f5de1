"""Malformed checkpoints: each is refused with exit status 2 and one clear line, and nothing is written."""

import json
import shutil
import struct
import time
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors

from convert.safetensors_files import TensorFile, header

INDEX = "model.safetensors.index.json"


def parts(path):
    """The header of a safetensors file as a mapping, and its data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_text(path, text, data):
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(change):
    def apply(folder):
        path = folder / "model.safetensors"
        entries, data = parts(path)
        data = change(entries, data) or data
        with_text(path, json.dumps(entries).encode(), data)

    return apply


def change_text(change):
    def apply(folder):
        path = folder / "model.safetensors"
        entries, data = parts(path)
        with_text(path, change(json.dumps(entries).encode()), data)

    return apply


def change_bytes(change):
    def apply(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def change_config(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def change_tensors(change):
    """Through the library's own writer: sound files whose tensors are not those of the model."""

    def apply(folder, tools):
        tensors = tools.random_tensors(tools.configs["dense"])
        change(tensors)
        tools.write_tensors(folder / "model.safetensors", tensors)

    return apply


def change_index(change):
    def apply(folder, tools):
        tensors = tools.random_tensors(tools.configs["dense"])
        (folder / "model.safetensors").unlink()
        tools.write_shards(folder, tensors, 3)
        path = folder / INDEX
        index = json.loads(path.read_text())
        text = change(index, folder)
        path.write_text(text if isinstance(text, str) else json.dumps(index))

    return apply


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


NORM, HEAD = "model.norm.weight", "lm_head.weight"
BAD = {
    # safetensors files
    "empty file": (replace("model.safetensors", b""), "it has 0 bytes"),
    "no header": (replace("model.safetensors", b"\x09" + bytes(7)), "header claims 9 bytes, 0 follow"),
    "truncated data": (change_bytes(lambda b: b[:-10]), "it is truncated: its tensors end at"),
    "truncated header": (change_bytes(lambda b: b[:100]), "it is truncated: its header claims"),
    "trailing bytes": (change_bytes(lambda b: b + b"more"), "4 bytes follow its last tensor"),
    "huge header": (change_bytes(lambda b: struct.pack("<Q", 10_000_001) + b[8:]), "more than the 10000000"),
    "astronomic header": (change_bytes(lambda b: b"\xff" * 8 + b[8:]), "more than the 10000000"),
    "not JSON": (change_text(lambda t: t[:-1]), "its header is not JSON that can be read: "),
    "leading space": (change_text(lambda t: b" " + t), "does not start with '{'"),
    "header is a list": (change_text(lambda t: b"[" + t + b"]"), "does not start with '{'"),
    "not UTF-8": (change_text(lambda t: t.replace(b"norm", b"n\xffrm")), "can't decode byte"),
    "text after header": (change_text(lambda t: t + b"{}"), "Extra data"),
    "duplicate tensor": (
        change_text(lambda t: t[:-1] + b', "model.norm.weight": {}}'),
        "'model.norm.weight' is given twice",
    ),
    "duplicate field": (change_text(lambda t: t.replace(b'"shape"', b'"dtype"', 1)), "'dtype' is given twice"),
    "NaN in header": (change_text(lambda t: t.replace(b"[32]", b"[NaN]", 1)), "NaN is not a JSON number"),
    "nested too deep": (change_text(lambda t: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "number too long": (
        change_text(lambda t: t.replace(b"[32]", b"[" + b"9" * 5000 + b"]", 1)),
        "its header is not JSON",
    ),
    "unknown field": (change_header(lambda e, d: e[NORM].update(more=1)), "exactly dtype, shape and data_offsets"),
    "entry is a list": (change_header(lambda e, d: e.update({NORM: []})), "exactly dtype, shape and data_offsets"),
    "no dtype": (change_header(lambda e, d: e[NORM].pop("dtype") and None), "exactly dtype, shape and data_offsets"),
    "float64": (change_header(lambda e, d: e[NORM].update(dtype="F64")), "dtype 'F64'; weights can be BF16, F16, F32"),
    "int8": (change_header(lambda e, d: e[NORM].update(dtype="I8")), "dtype 'I8'; weights can be"),
    "dtype a list": (change_header(lambda e, d: e[NORM].update(dtype=["BF16"])), "weights can be BF16, F16, F32"),
    "negative offset": (
        change_header(lambda e, d: e[NORM].update(data_offsets=[-64, 0])),
        "expected two whole numbers",
    ),
    "three offsets": (change_header(lambda e, d: e[NORM]["data_offsets"].append(1)), "expected two whole numbers"),
    "offset is true": (
        change_header(lambda e, d: e[NORM].update(data_offsets=[True, 65])),
        "expected two whole numbers",
    ),
    "negative shape": (change_header(lambda e, d: e[NORM].update(shape=[-32])), "expected a list of whole numbers"),
    "shape too large": (change_header(lambda e, d: e[NORM].update(shape=[2**62, 2**62])), "takes"),
    "length and shape": (change_header(lambda e, d: e[NORM].update(shape=[31])), "takes 62 bytes"),
    "overlap": (
        change_header(
            lambda e, d: e[NORM].update(data_offsets=e["model.layers.0.input_layernorm.weight"]["data_offsets"])
        ),
        "overlaps the tensor before it",
    ),
    "hole": (
        change_header(lambda e, d: e.pop("model.layers.0.input_layernorm.weight") and None),
        "leaves a hole before it",
    ),
    "metadata not text": (change_header(lambda e, d: e.update(__metadata__={"a": 1})), "__metadata__ is not a mapping"),
    "metadata a list": (change_header(lambda e, d: e.update(__metadata__=[])), "__metadata__ is not a mapping"),
    # tensors against config.json
    "missing": (
        change_tensors(lambda t: (t.pop(NORM), t.pop(HEAD))),
        "2 tensors missing (model.norm.weight, lm_head.weight)",
    ),
    "unknown": (
        change_tensors(lambda t: t.update({"evil\nname": t[NORM], "../x": t[NORM]})),
        r"2 unknown tensors (",
    ),
    "without prefix": (
        change_tensors(lambda t: t.update({k.removeprefix("model."): t.pop(k) for k in list(t)})),
        "26 tensors missing",
    ),
    "other shape": (
        change_tensors(lambda t: t.update({NORM: t[NORM][:-1].copy()})),
        "[31] in the file, [32] by config.json",
    ),
    "transposed": (
        change_tensors(lambda t: t.update({k: np.ascontiguousarray(v.T) for k, v in t.items() if "down_proj" in k})),
        "2 of another shape (model.layers.0.mlp.down_proj.weight: [48, 32] in the file, [32, 48] by config.json",
    ),
    "everything at once": (
        change_tensors(lambda t: (t.pop(HEAD), t.update(x=t[NORM].copy()), t.update({NORM: t[NORM][1:].copy()}))),
        "1 tensors missing (lm_head.weight); 1 unknown tensors ('x'); 1 of another shape (model.norm.weight",
    ),
    "config of another model": (change_config(hidden_size=64), "of another shape (model.embed_tokens.weight: [96, 32]"),
    "vocabulary": (
        change_config(vocab_size=100),
        "model.embed_tokens.weight: [96, 32] in the file, [100, 32] by config",
    ),
    "more layers": (change_config(num_hidden_layers=3), "12 tensors missing (model.layers.2."),
    "fewer layers": (change_config(num_hidden_layers=1), "12 unknown tensors ("),
    "tied, heads differ": (
        change_config(tie_word_embeddings=True),
        "lm_head.weight and model.embed_tokens.weight differ",
    ),
    # config.json
    "no config": (remove("config.json"), "config.json is missing"),
    "config not JSON": (replace("config.json", b"{'a': 1}"), "config.json is not JSON that can be read: "),
    "config a list": (replace("config.json", b"[]"), "expected an object"),
    "config twice": (replace("config.json", b'{"vocab_size": 1, "vocab_size": 2}'), "'vocab_size' is given twice"),
    "other architecture": (
        change_config(model_type="llama"),
        "model_type must be one of qwen2, qwen2_moe, got 'llama'",
    ),
    "sliding window": (change_config(use_sliding_window=True), "use_sliding_window = True is not supported"),
    # tokenizer
    "tokenizer too large": (
        replace("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 96}]}'),
        "ids up to 96, but the embedding has 96 rows",
    ),
    "vocab.json too large": (replace("vocab.json", b'{"a": 200}'), "ids up to 200, but the embedding has 96 rows"),
    "tokenizer malformed": (replace("tokenizer.json", b'{"model": 3}'), "tokenizer.json is not a tokenizer file"),
    # folder and index
    "no weights": (remove("model.safetensors"), "holds no weights"),
    "pickle only": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "loading a pickle can run code",
    ),
    "both": (replace(INDEX, b"{}"), "holds both model.safetensors and model.safetensors.index.json"),
    "index not JSON": (change_index(lambda index, folder: "{"), f"{INDEX} is not JSON that can be read: "),
    "index empty": (change_index(lambda index, folder: "{}"), "expected an object with a weight_map"),
    "index twice": (
        change_index(lambda index, folder: '{"weight_map": {"a": "b", "a": "c"}}'),
        "the key 'a' is given twice",
    ),
    "index escapes": (
        change_index(
            lambda index, folder: index["weight_map"].update({NORM: "../hf/model-00001-of-00003.safetensors"})
        ),
        "expected the plain name of a .safetensors file",
    ),
    "index absolute": (
        change_index(lambda index, folder: index["weight_map"].update({NORM: "/etc/passwd"})),
        "'/etc/passwd'; expected the plain name",
    ),
    "index not text": (change_index(lambda index, folder: index["weight_map"].update({NORM: 3})), "is said to be in 3"),
    "index hidden": (
        change_index(lambda index, folder: index["weight_map"].update({NORM: "...safetensors"})),
        "expected the plain name",
    ),
    "shard missing": (
        change_index(lambda index, folder: (folder / "model-00002-of-00003.safetensors").unlink()),
        "1 of 3 weight files missing (model-00002-of-00003.safetensors)",
    ),
    "tensor not in shard": (
        change_index(lambda index, folder: index["weight_map"].update(more="model-00002-of-00003.safetensors")),
        "1 tensors that the index lists but its file lacks ('more')",
    ),
    "tensor in other shard": (
        change_index(lambda i, folder: i["weight_map"].update({HEAD: "model-00001-of-00003.safetensors"})),
        "1 tensors that the index lists but its file lacks ('lm_head.weight')",
    ),
    "tensor not in index": (
        change_index(lambda index, folder: index["weight_map"].pop(NORM) and None),
        "1 tensors that a file holds but the index lacks ('model.norm.weight')",
    ),
    "tensor in two shards": (
        change_index(
            lambda index, folder: (
                shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "extra.safetensors"),
                index["weight_map"].update({"model.embed_tokens.weight": "extra.safetensors"}),
            )
        ),
        "tensors in several files (",
    ),
    "total size": (
        change_index(lambda index, folder: index["metadata"].update(total_size=1)),
        "total_size is 1, but the tensors in its files have 43584 bytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoint(name, make_hf, tools, run, snapshot, tmp_path):
    spoil, message = BAD[name]
    folder = make_hf("dense")
    spoil(folder, tools) if spoil.__code__.co_argcount == 2 else spoil(folder)
    before = snapshot(tmp_path)
    status, out, error = run("from-hf", folder, tmp_path / "ours")
    assert (status, out) == (2, "")
    assert error.startswith("qwen2-jax: error: ") and error.endswith("\n") and error[:-1].isprintable()
    assert message in error
    assert len(error) < 1500
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["dangling", "folder"])
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "LICENSE"])
def test_small_files_that_are_none(name, kind, make_hf, run, tmp_path):
    """A name that is there says that the file is meant to be: it is not dropped in silence."""
    folder = make_hf("dense")
    (folder / name).unlink(missing_ok=True)
    if kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/nowhere/at/all")
    status, _, error = run("from-hf", folder, tmp_path / "ours")
    assert status == 2
    assert f"{name} is {'not a file' if kind == 'folder' else 'a link to something that is not there'}" in error
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", ["dense", "moe", "fused"])
@pytest.mark.parametrize(("key", "count"), [("num_hidden_layers", 4000), ("num_experts", 16_000)])
def test_counts_of_another_world(key, count, kind, make_hf, run, tmp_path):
    """Refused at once, by the tensors that there are, not after building a table of that size."""
    folder = make_hf("moe" if kind == "fused" else kind, fused=kind == "fused")
    change_config(**{"num_experts": 4, "num_experts_per_tok": 2, "model_type": "qwen2_moe", key: count})(folder)
    begin = time.monotonic()
    status, _, error = run("from-hf", folder, tmp_path / "ours")
    assert (status, error.count("\n")) == (2, 1)
    assert f"{key} {count}" in error and "they do not belong together" in error
    assert time.monotonic() - begin < 5


def pickled(change):
    """A folder whose pytorch_model.bin has been changed by `change(torch, state)`."""

    def apply(folder, tools):
        torch = pytest.importorskip("torch")
        tensors = tools.random_tensors(tools.configs["dense"], "float32")
        state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        state[NORM] = change(torch, state[NORM])
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")

    return apply


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda torch, x: x.to_sparse(), "is sparse, nested or without data"),
        (lambda torch, x: x.to("meta"), "is sparse, nested or without data"),
        (lambda torch, x: torch.nested.nested_tensor([x, x[:2]]), "is sparse, nested or without data"),
        (lambda torch, x: torch.ones(1).expand(10**12), "is larger than the file"),
        (lambda torch, x: x.double(), "is 'float64'"),
        (lambda torch, x: 5, "is 'int'"),
    ],
    ids=["sparse", "meta", "nested", "expanded", "double", "int"],
)
def test_pickles_of_other_things(change, message, make_hf, tools, run, tmp_path):
    folder = make_hf("dense", dtype="float32")
    pickled(change)(folder, tools)
    status, _, error = run("from-hf", folder, tmp_path / "ours", "--allow-pickle")
    assert (status, error.count("\n")) == (2, 1)
    assert f"'{NORM}' " in error and message in error


def test_pickled_views(make_hf, tools, run, tmp_path):
    """Tensors whose numbers are another's, negated or seen in another order, are read as what they stand for."""
    folder = make_hf("dense", dtype="float32")
    pickled(lambda torch, x: torch._neg_view(-x))(folder, tools)
    assert run("from-hf", folder, tmp_path / "ours", "--allow-pickle")[0] == 0
    tensors = tools.random_tensors(tools.configs["dense"], "float32")
    assert run("verify", make_hf("dense", name="plain", dtype="float32", tensors=tensors), tmp_path / "ours")[0] == 0


# Random edits of the texts around the weights: the model is converted, or refused in one line, and nothing else.
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.data())
def test_random_edits(tmp_path_factory, make_hf, tools, run, data):
    folder = tmp_path_factory.getbasetemp() / "edited"
    if not folder.exists():
        make_hf("dense", shards=2).rename(folder)
    path = folder / data.draw(st.sampled_from([INDEX, "tokenizer.json"]))
    original = path.read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    out = tmp_path_factory.mktemp("edit") / "ours"
    path.write_bytes(content)
    try:
        status, _, error = run("from-hf", folder, out)
    finally:
        path.write_bytes(original)
    assert (status, error.count("\n")) in {(0, 0), (2, 1)}
    assert out.exists() == (status == 0) and not out.with_name("ours.partial").exists()
    assert len(error) < 1500


def test_experts_of_several_dtypes(make_hf, tools, run, tmp_path):
    tensors = tools.random_tensors(tools.configs["moe"])
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    status, _, error = run("from-hf", make_hf("moe", tensors=tensors), tmp_path / "ours")
    assert status == 2
    assert "1 of several dtypes (layers_1.moe.experts.up: bfloat16, float32)" in error


def test_missing_tensors_are_listed_up_to_a_limit(make_hf, tools, run, tmp_path):
    status, _, error = run("from-hf", make_hf("moe", tensors={"x": np.ones(3, np.float32)}), tmp_path / "ours")
    assert status == 2
    assert "55 tensors missing (lm_head.weight, model.embed_tokens.weight, model.layers.0." in error
    assert ", ...); 1 unknown tensors ('x')" in error
    assert error.count("model.layers.") == 6


def test_file_that_changes_while_it_is_read(make_hf, tmp_path):
    folder = make_hf("dense")
    file = TensorFile(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"x")
    with pytest.raises(ValueError, match="changed while it was being read"):
        file.read("model.norm.weight", 0, np.empty(32, file.tensors["model.norm.weight"].dtype))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no folder nowhere; for a model of the Hugging Face hub write owner/name, as Qwen/"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("x" * 5000, "there is no folder xxx"),
        ("a/b/\x1b[2J", r"there is no folder a/b/\x1b[2J"),
        ("file", "is a file"),
        (".", "config.json is missing in /"),
    ],
)
def test_no_folder(source, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    status, _, error = run("from-hf", source, "ours")
    assert (status, error.count("\n")) == (2, 1)
    assert message in error and len(error) < 600


def test_hub_without_a_network(run, tmp_path):
    status, _, error = run("from-hf", "Qwen/Qwen2-0.5B", tmp_path / "ours")
    assert status == 2
    assert error.count("\n") == 1
    assert "there is no folder Qwen/Qwen2-0.5B; the Hugging Face hub was asked for it: it could not be reached" in error
    assert "download the model where a network exists and pass the folder" in error


@pytest.fixture
def hub(make_hf, monkeypatch):
    """A folder that stands for the hub's only model, and the patterns of files that were asked for."""

    def snapshot_download(name, allow_patterns):
        assert name == "Qwen/Qwen2-0.5B"
        asked.append(allow_patterns)
        return str(folder)

    asked, folder = [], make_hf("dense")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return folder, asked


@pytest.mark.parametrize("option", [[], ["--allow-pickle"]])
def test_hub_download(option, hub, run, tmp_path):
    """Where there are safetensors, no pickle is downloaded, even if it were allowed."""
    _, asked = hub
    assert run("from-hf", "Qwen/Qwen2-0.5B", tmp_path / "ours", *option)[0] == 0
    assert len(asked) == 1
    assert "*.safetensors" in asked[0] and "*.bin" not in asked[0]


def test_hub_download_of_pickles(hub, run, tmp_path):
    folder, asked = hub
    (folder / "model.safetensors").unlink()
    run("from-hf", "Qwen/Qwen2-0.5B", tmp_path / "ours", "--allow-pickle")
    assert ["*.bin" in patterns for patterns in asked] == [False, True]


def test_hub_download_of_a_tokenizer(hub, tmp_path):
    from convert import load_checkpoint, save_checkpoint

    folder, asked = hub
    save_checkpoint(tmp_path / "saved", *load_checkpoint(folder), tokenizer_from="Qwen/Qwen2-0.5B")
    assert (tmp_path / "saved/tokenizer.json").exists()
    assert not any(".safetensors" in pattern or ".bin" in pattern for pattern in asked[0])


def test_what_went_wrong_at_the_hub(run, tmp_path, monkeypatch):
    from huggingface_hub import errors

    def response(status):
        return types.SimpleNamespace(status_code=status, headers={}, request=None)

    for error, message in [
        (errors.GatedRepoError("gated", response=response(403)), "it needs a token: accept its terms"),
        (errors.RepositoryNotFoundError("404", response=response(404)), "it has no such model: check the name"),
        (errors.HfHubHTTPError("401", response=response(401)), "it needs a token, or another one"),
        (errors.LocalEntryNotFoundError("no network"), "it could not be reached (no network)"),
        (OSError(28, "No space left on device", "/cache"), "it could not be stored: /cache No space left on device"),
    ]:

        def snapshot_download(name, allow_patterns, error=error):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        status, _, line = run("from-hf", "Qwen/Qwen2-0.5B", tmp_path / "ours")
        assert (status, line.count("\n")) == (2, 1)
        assert message in line


def test_wrong_direction(make_hf, run, tmp_path):
    folder = make_hf("dense")
    assert run("from-hf", folder, tmp_path / "ours")[0] == 0
    status, _, error = run("from-hf", tmp_path / "ours", tmp_path / "again")
    assert (status, "is a checkpoint of ours already" in error) == (2, True)
    status, _, error = run("to-hf", folder, tmp_path / "again")
    assert (status, "is not a checkpoint of ours" in error) == (2, True)
    status, _, error = run("from-hf", folder, folder)
    assert (status, "is the source itself" in error) == (2, True)


# What the format's own library accepts and we refuse, and that we refuse nothing else, is pinned by random edits.
_VALID = header({"a": (np.dtype(np.float32), (2, 3)), "b": (np.dtype(np.float16), (4,))})[0]


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.data())
def test_random_headers(tmp_path_factory, data):
    content = bytearray(_VALID + bytes(32))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "digit"])):
            case "flip":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=4))
            case "delete":
                del content[place : place + data.draw(st.integers(1, 4))]
            case "digit":
                content[place : place + 1] = data.draw(st.sampled_from([b"0", b"9", b"-", b'"', b"]", b"1e3", b"true"]))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(content)
    try:
        tensors = TensorFile(path).tensors
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    entries = dict(safetensors.deserialize(bytes(content)))
    assert {name: tuple(entry["shape"]) for name, entry in entries.items()} == {n: t.shape for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert entries[name]["data"] == content[tensor.begin : tensor.begin + tensor.nbytes]
