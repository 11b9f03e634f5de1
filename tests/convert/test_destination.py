"""What a conversion may replace: nothing of anybody else's, not its own source, and nothing that came meanwhile."""

import json
import os
import shutil
from pathlib import Path

import pytest

from convert import workspace
from convert.conversion import convert_from_hf, convert_to_hf
from convert.native import NativeSink


@pytest.fixture
def refused(run, tmp_path, snapshot):
    """refused(message, *arguments): exit status 2, one line with `message`, and no file anywhere is another one."""

    def check(message, *arguments):
        before = snapshot(tmp_path)
        status, out, error = run(*arguments)
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert message in error
        assert snapshot(tmp_path) == before

    return check


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_source_inside_the_destination(make_hf, refused, tmp_path):
    make_hf("dense", name="out")
    source = make_hf("dense", name="out/checkpoint-500", seed=1)
    for overwrite in ([], ["--overwrite"]):
        refused(f"out holds the source {source}", "from-hf", source, tmp_path / "out", *overwrite)
    refused("is the source itself", "from-hf", source, source, "--overwrite")


def test_a_source_whose_files_are_links_into_the_destination(make_hf, refused, tmp_path):
    target = make_hf("dense", name="out")
    source = make_hf("dense", name="links")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(target / "model.safetensors")
    refused("out holds the source", "from-hf", source, target, "--overwrite")


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-500/model.safetensors", "params/notes", "tokenizer.json/x"])
def test_a_folder_with_anything_else_is_not_replaced(name, make_hf, refused, tmp_path):
    convert_from_hf(make_hf("dense"), tmp_path / "out")
    path = tmp_path / "out" / name
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_text("years of work")
    refused(f"('{name}')", "from-hf", make_hf("dense", name="new"), tmp_path / "out", "--overwrite")


def test_both_kinds_of_checkpoints_are_replaced(make_hf, run, tmp_path):
    source = make_hf("moe")
    for out in (tmp_path / "ours", make_hf("moe", name="other", shards=3)):
        for _ in range(2):
            assert run("from-hf", source, out, "--overwrite")[0] == 0
        assert run("verify", source, out)[0] == 0
    assert entries(tmp_path) == ["hf", "other", "ours"]


def test_a_source_at_the_place_of_work(make_hf, refused, tmp_path):
    convert_from_hf(make_hf("dense"), tmp_path / "model.partial")
    refused("is the source itself", "to-hf", tmp_path / "model.partial", tmp_path / "model")


def test_a_checkpoint_at_the_place_of_work(make_hf, refused, tmp_path):
    """A finished checkpoint, whatever its name, is never taken for unfinished work."""
    convert_from_hf(make_hf("dense"), tmp_path / "model.partial")
    refused("model.partial is in the way", "from-hf", make_hf("dense", name="new"), tmp_path / "model")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_no_folder_at_the_place_of_work(kind, make_hf, refused, tmp_path):
    if kind == "file":
        (tmp_path / "out.partial").write_text("years of work")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    refused("out.partial is in the way", "from-hf", make_hf("dense"), tmp_path / "out")


def test_unfinished_work_on_something_else(make_hf, refused, tmp_path, monkeypatch):
    """Work on X that was renamed to Y.partial is not for Y."""
    source = make_hf("dense")
    with monkeypatch.context() as patch:
        patch.setattr(NativeSink, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_from_hf(source, tmp_path / "x")
    (tmp_path / "x.partial").rename(tmp_path / "y.partial")
    refused("y.partial is in the way", "from-hf", source, tmp_path / "y")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("when", ["work", "flush", "rename"])
def test_a_destination_that_appears_meanwhile(when, overwrite, make_hf, tmp_path, monkeypatch):
    source, out = make_hf("dense"), tmp_path / "out"

    def appear():
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("years of work")

    with monkeypatch.context() as patch:
        if when == "work":
            finish = NativeSink.finish
            patch.setattr(NativeSink, "finish", lambda *arguments: (finish(*arguments), appear()))
        elif when == "flush":
            patch.setattr(workspace, "sync_tree", lambda folder: appear())
        else:
            rename = os.rename
            patch.setattr(os, "rename", lambda a, b: (appear() if a.name == "out.partial" else None, rename(a, b)))
        with pytest.raises(ValueError, match="out changed while the work was done, and is not replaced"):
            convert_from_hf(source, out, overwrite=overwrite)
    assert entries(out) == ["thesis.txt"]
    shutil.rmtree(out)
    report = convert_from_hf(source, out, overwrite=overwrite)
    assert report.bytes_resumed == report.bytes


@pytest.mark.parametrize("renamed", ["out", "out.partial"])
def test_what_is_added_to_the_old_checkpoint_meanwhile(renamed, make_hf, tmp_path, snapshot, monkeypatch):
    """Even in the moment between the last look at it and its exchange."""
    convert_from_hf(make_hf("dense", name="old"), tmp_path / "out")
    before = snapshot(tmp_path / "out")
    rename, once = os.rename, [None]

    def add_then_rename(a, b):
        if once and a.name == renamed:
            once.pop()
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out/thesis.txt").write_text("years of work")
        rename(a, b)

    monkeypatch.setattr(os, "rename", add_then_rename)
    with pytest.raises(ValueError, match="out changed while the work was done, and is not replaced"):
        convert_from_hf(make_hf("dense", seed=1), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/thesis.txt").exists()
    (aside,) = [tmp_path / "out"] if renamed == "out" else tmp_path.glob(".replaced-*")
    assert snapshot(aside).items() >= before.items()


def test_the_loser_of_a_race_does_not_replace_the_winner(make_hf, run, tmp_path, monkeypatch):
    first, second = make_hf("dense", name="a"), make_hf("dense", name="b", seed=1)
    lock, once = workspace._lock, [None]

    def overtaken(destination):
        while once:
            once.pop()
            convert_from_hf(first, destination)
        return lock(destination)

    monkeypatch.setattr(workspace, "_lock", overtaken)
    status, _, error = run("from-hf", second, tmp_path / "out")
    assert (status, "exists already" in error) == (2, True)
    assert run("verify", first, tmp_path / "out")[0] == 0
    assert entries(tmp_path) == ["a", "b", "out"]


def test_folders_with_names_like_ours_survive(make_hf, tmp_path, snapshot):
    convert_from_hf(make_hf("dense", name="old"), tmp_path / "out")
    for name in (".out.replaced", ".replaced-abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    convert_from_hf(make_hf("dense", seed=1), tmp_path / "out", overwrite=True)
    assert entries(tmp_path) == [".out.replaced", ".replaced-abcdefgh", "hf", "old", "out"]


def test_a_crash_after_the_last_rename(make_hf, tmp_path, snapshot, monkeypatch):
    """The new checkpoint is in place, the old one still aside: the same command, or a later one, clears it away."""
    convert_from_hf(make_hf("dense", name="old"), tmp_path / "out")
    source = make_hf("dense", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "remove_leftovers", lambda destination: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_from_hf(source, tmp_path / "out", overwrite=True)
    assert len(entries(tmp_path)) == 4
    assert convert_from_hf(source, tmp_path / "out").already_complete
    assert entries(tmp_path) == ["hf", "old", "out"]


@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_mount_points(place, make_hf, refused, tmp_path, monkeypatch):
    (tmp_path / place).mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / place)
    message = "is a mount point" if place == "out" else "is in the way"
    refused(message, "from-hf", make_hf("dense"), tmp_path / "out")


@pytest.fixture
def twins(make_hf):
    """Two sources that differ in numbers only: same names, sizes and times of modification."""
    folders = [make_hf("dense", name=name, seed=seed) for seed, name in enumerate("ab")]
    for folder in folders:
        for path in folder.iterdir():
            os.utime(path, ns=(0, 0))
    return folders


def test_twins_are_not_mixed_on_resumption(twins, run, tmp_path, monkeypatch):
    first, second = twins
    original, count = NativeSink.write, iter(range(12))
    with monkeypatch.context() as patch:
        patch.setattr(NativeSink, "write", lambda *arguments: (next(count), original(*arguments)))
        with pytest.raises(StopIteration):
            convert_from_hf(first, tmp_path / "out")
    status, out, error = run("from-hf", second, tmp_path / "out", "--json")
    assert (status, json.loads(out)["bytes_resumed"]) == (0, 0)
    assert f"was for another task and was thrown away: source: '{first}' then, '{second}' now" in error
    assert run("verify", second, tmp_path / "out")[0] == 0


def test_twins_are_not_complete_already(twins, refused, run, tmp_path):
    convert_from_hf(twins[0], tmp_path / "out")
    refused(f"exists already, made differently (source: '{twins[0]}' then", "from-hf", twins[1], tmp_path / "out")
    shutil.copy2(twins[1] / "model.safetensors", twins[0] / "model.safetensors")
    refused("'model.safetensors' has another time of change", "from-hf", twins[0], tmp_path / "out")
    refused("dtype: None then, 'float32' now", "from-hf", twins[0], tmp_path / "out", "--dtype", "float32")


@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_complete_already_looks(direction, make_hf, refused, run, tmp_path):
    source, out = make_hf("dense"), tmp_path / "out"
    if direction == "to-hf":
        convert_from_hf(source, tmp_path / "ours")
        source = tmp_path / "ours"
    (convert_from_hf if direction == "from-hf" else convert_to_hf)(source, out)
    weights = out / ("model.safetensors" if direction == "to-hf" else "params/norm.scale/c/0")
    assert "is complete already" in run(direction, source, out)[1]
    weights.write_bytes(weights.read_bytes() + b"x")
    refused(f"gone or of another size (such as '{weights.relative_to(out)}')", direction, source, out)
    weights.unlink()
    refused("1 of its files are gone", direction, source, out)
    assert run(direction, source, out, "--overwrite")[0] == 0
    assert "is complete already" in run(direction, source, out)[1]


@pytest.mark.parametrize("path", ["~nosuchuser/x", ""])
def test_paths_that_lead_nowhere(path, make_hf, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "no such user" if path else "path of a folder is empty"
    refused(message, "from-hf", path, tmp_path / "out")
    refused(message, "to-hf", path or "~nosuchuser", tmp_path / "out") if path else None
    refused(message, "from-hf", make_hf("dense"), path) if path else None
