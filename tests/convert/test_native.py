"""Our checkpoint folder: readable by Orbax, and no damage goes unnoticed."""

import hashlib
import json
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import load_checkpoint
from convert.conversion import convert_from_hf


@pytest.fixture
def ours(make_hf, tmp_path):
    convert_from_hf(make_hf("moe"), tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.filterwarnings("ignore")  # Orbax's own
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_orbax_restores_it(kind, make_hf, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.chunks.chunk_shape.__defaults__", (1000,))  # several chunks, the last one padded
    convert_from_hf(make_hf(kind), tmp_path / "ours")
    restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(tmp_path / "ours" / "params")
    _, params = load_checkpoint(tmp_path / "ours")
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), restored, params
    )


def test_every_flipped_bit_is_noticed(ours):
    """One bit in each file, at a random place: an error that names the file or what it holds, never other numbers."""
    draw = np.random.default_rng(0)
    files = [path for path in ours.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert len(files) >= 80
    for path in files:
        content = path.read_bytes()
        for _ in range(10 if path.name == "manifest.json" else 2):
            place, bit = int(draw.integers(len(content))), int(draw.integers(8))
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError) as caught:
                load_checkpoint(ours)
            message = str(caught.value)
            assert "\n" not in message
            if "/c/" in str(path):
                assert str(path) in message
                assert f"array {path.relative_to(ours / 'params').parts[0]} is damaged" in message
            else:
                assert path.name in message or "manifest.json" in message
        path.write_bytes(content)
    load_checkpoint(ours)


def test_digest_is_that_of_the_file(ours):
    manifest = json.loads((ours / "manifest.json").read_text())
    entry = manifest["arrays"]["layers_0.moe.experts.up"]
    file = ours / "params/layers_0.moe.experts.up/c/0/0/0"
    printed = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout
    assert entry["sha256"] == [printed.split()[0]]
    assert (entry["dtype"], entry["shape"], entry["chunk"]) == ("bfloat16", [4, 16, 32], [4, 16, 32])


@pytest.mark.parametrize("name", ["c/0/0", "zarr.json"])
def test_missing_files(ours, name):
    path = ours / "params/layers_0.moe.router.kernel" / name
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        load_checkpoint(ours)


def test_truncated_chunk(ours):
    path = ours / "params/norm.scale/c/0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"norm\.scale/c/0 is truncated: it ends 1 bytes too early"):
        load_checkpoint(ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="something"), "is not the manifest of a qwen2_jax checkpoint"),
        (lambda m: m.update(version=2), "is of version 2, this program reads 1"),
        (lambda m: m.pop("arrays"), "list of files or arrays is missing"),
        (lambda m: m["files"].pop("config.json"), "list of files or arrays is missing"),
        (lambda m: m["files"].update({"../../etc/passwd": ""}), "names a file outside its folder"),
        (lambda m: m["files"].update({"..": ""}), "names a file outside its folder: '..'"),
        (lambda m: m["files"].update({"a\nb" * 1000: ""}), r"names a file outside its folder: 'a\nba\nb"),
        (lambda m: m.update(version=True), "is of version True, this program reads 1"),
        (lambda m: m["arrays"].clear(), "37 arrays missing (embed.embedding, "),
        (lambda m: m["arrays"].pop("norm.scale"), "1 arrays missing (norm.scale)"),
        (lambda m: m["arrays"].update(more={}), "1 unknown arrays ('more')"),
        (lambda m: m["arrays"]["norm.scale"].update(shape=[31]), "not as config.json has them (norm.scale)"),
        (lambda m: m["arrays"]["norm.scale"].update(dtype=["bfloat16"]), "not as config.json has them (norm.scale)"),
        (lambda m: m["arrays"]["norm.scale"].update(chunk=[0]), "not as config.json has them (norm.scale)"),
        (lambda m: m["arrays"]["norm.scale"].update(sha256=[]), "not as config.json has them (norm.scale)"),
        (lambda m: m["arrays"].update({"norm.scale": 3}), "not as config.json has them (norm.scale)"),
        (lambda m: m["arrays"]["norm.scale"].update(chunk=[16], sha256=["", ""]), "does not describe array norm.scale"),
    ],
)
def test_malformed_manifest(ours, change, message):
    path = ours / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError) as caught:
        load_checkpoint(ours)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("key", "count"), [("num_hidden_layers", 4000), ("num_experts", 16_000)])
def test_counts_of_another_world(key, count, ours):
    config, path = ours / "config.json", ours / "manifest.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: count}))
    manifest = json.loads(path.read_text())
    manifest["files"]["config.json"] = hashlib.sha256(config.read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{key} {count}.*they do not belong together"):
        load_checkpoint(ours)


def test_a_folder_without_its_manifest_is_no_checkpoint(ours):
    (ours / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_checkpoint(ours)
