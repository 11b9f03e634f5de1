"""Interrupted conversions: the same command finishes the rest, and a destination is whole or absent."""

import errno
import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from convert import files
from convert.conversion import convert_from_hf, convert_to_hf
from convert.hugging_face import HuggingFaceSink
from convert.native import NativeSink


class Crash(Exception):
    """Stands for the power cut: nothing in the converter handles it."""


@pytest.fixture(params=["from-hf", "to-hf"])
def job(request, make_hf, tmp_path, snapshot):
    """(convert, sink class, what an undisturbed run makes) for each direction."""
    source = make_hf("moe")
    convert_from_hf(source, tmp_path / "whole")
    if request.param == "from-hf":
        return lambda: convert_from_hf(source, tmp_path / "out"), NativeSink, snapshot(tmp_path / "whole")
    convert_to_hf(tmp_path / "whole", tmp_path / "whole_hf")
    return lambda: convert_to_hf(tmp_path / "whole", tmp_path / "out"), HuggingFaceSink, snapshot(tmp_path / "whole_hf")


def test_a_crash_at_any_write(job, tmp_path, snapshot, monkeypatch):
    """Stops at the first, third, ... write, each time half-way through it, going on from where the last run stopped."""
    convert, sink, expected = job
    original = sink.write
    for stop in range(0, 31, 2):  # fewer writes in all than there are parts, so that every run has some left
        counter = itertools.count(1)  # which several threads may share

        def write(self, path, chunk, numbers, stop=stop, counter=counter):
            if next(counter) > stop % 5:
                original(self, path, chunk, np.full_like(numbers, 7))
                raise Crash
            original(self, path, chunk, numbers)

        monkeypatch.setattr(sink, "write", write)
        with pytest.raises(Crash):
            convert()
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sink, "write", original)
    report = convert()
    assert 0 < report.bytes_resumed < report.bytes
    assert snapshot(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def test_what_was_damaged_meanwhile_is_done_again(job, tmp_path, snapshot, monkeypatch):
    convert, sink, expected = job
    with monkeypatch.context() as patch:
        patch.setattr(sink, "finish", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            convert()
    draw = random.Random(0)
    written = (path for path in (tmp_path / "out.partial").rglob("*") if path.is_file())
    weights = [path for path in written if path.suffix == ".safetensors" or path.name == "0"]
    for path in draw.sample(weights, min(5, len(weights))):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    draw.choice(weights).unlink()
    convert()
    assert snapshot(tmp_path / "out") == expected


TORN = [
    b'{"part": "norm',
    b"\0\0\0\0",
    b'{"part"}\n',
    b"[]\n",
    b'{"part": "x"}\n',
    b'{"part": ["x"], "receipt": {"sha256": ""}}\n',
    b'{"part": "x", "receipt": null}\n',
    b'{"part": "x", "receipt": {}}\n',
    b'{"part": "x", "receipt": {"sha256": 3}}\n',
    b'{"part": "x", "receipt": {"sha256": "", "nonfinite": "abc"}}\n',
    b'{"part": "x", "receipt": {"sha256": "", "overflowed": {"x": "y"}}}\n',
    b'{"aside": "../thesis"}\n',
]


@pytest.mark.parametrize("torn", TORN)
def test_torn_receipts(torn, job, tmp_path, snapshot, monkeypatch):
    convert, sink, expected = job
    with monkeypatch.context() as patch:
        patch.setattr(sink, "finish", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            convert()
    receipts = tmp_path / "out.partial" / ".receipts.jsonl"
    lines = receipts.read_bytes().splitlines(keepends=True)
    receipts.write_bytes(b"".join([*lines[:20], torn, *lines[20:]]))
    report = convert()
    assert 0 < report.bytes_resumed < report.bytes
    assert snapshot(tmp_path / "out") == expected


def test_other_options_or_another_source_start_afresh(make_hf, tools, tmp_path, monkeypatch, snapshot):
    source = make_hf("dense", dtype="float32")
    convert_from_hf(source, tmp_path / "whole", dtype="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(NativeSink, "finish", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            convert_from_hf(source, tmp_path / "out")
    report = convert_from_hf(source, tmp_path / "out", dtype="bfloat16")
    assert report.bytes_resumed == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_source_that_changes_meanwhile(make_hf, tmp_path, monkeypatch):
    source = make_hf("dense")
    original = NativeSink.finish

    def finish(self, digests):
        original(self, digests)
        os.utime(source / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(NativeSink, "finish", finish)
    with pytest.raises(ValueError, match="changed while it was being converted"):
        convert_from_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_writer_at_a_time(make_hf, run, tmp_path):
    source = make_hf("dense")
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / ".receipts.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, error = run("from-hf", source, tmp_path / "out")
        assert (status, "another process is writing" in error) == (2, True)
    assert run("from-hf", source, tmp_path / "out")[0] == 0


def test_a_folder_in_the_way_is_left_alone(make_hf, run, tmp_path, snapshot):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    status, _, error = run("from-hf", make_hf("dense"), tmp_path / "out")
    assert (status, "is in the way" in error) == (2, True)
    assert snapshot(tmp_path / "out.partial") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_only_checkpoints_are_replaced(what, overwrite, make_hf, run, tmp_path, snapshot):
    if what == "file":
        (tmp_path / "out").write_text("years of work")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/model.safetensors").write_text("years of work")
    source = make_hf("dense")
    before = snapshot(tmp_path)
    status, _, error = run("from-hf", source, tmp_path / "out", *overwrite)
    assert status == 2
    assert ("is not a checkpoint" if overwrite else "exists already") in error
    assert snapshot(tmp_path) == before


def test_replaced_only_when_complete(make_hf, run, tmp_path, snapshot, monkeypatch):
    convert_from_hf(make_hf("dense", name="old"), tmp_path / "out")
    before = snapshot(tmp_path / "out")
    source = make_hf("dense", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(NativeSink, "finish", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            convert_from_hf(source, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == before
    assert run("from-hf", source, tmp_path / "out", "--overwrite")[0] == 0
    assert snapshot(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "old", "out"]
    assert run("verify", source, tmp_path / "out")[0] == 0


def test_a_crash_between_the_two_renames(make_hf, tmp_path, snapshot, monkeypatch):
    """The old checkpoint is aside, the new one not yet in place: both exist, and the next run puts the old one back."""
    convert_from_hf(make_hf("dense", name="old"), tmp_path / "out")
    before = snapshot(tmp_path / "out")
    source = make_hf("dense", seed=1)
    convert_from_hf(source, tmp_path / "whole")
    original, crashed = os.rename, []

    def rename(a, b):
        if os.fspath(a).endswith(".partial") or crashed:
            crashed.append(a)  # and whatever is tried after it
            raise Crash
        original(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(Crash):
            convert_from_hf(source, tmp_path / "out", overwrite=True)
    (aside,) = tmp_path.glob(".replaced-*")
    assert snapshot(aside) == before
    assert snapshot(tmp_path / "out.partial") == snapshot(tmp_path / "whole")
    with pytest.raises(ValueError, match="out exists already"):
        convert_from_hf(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    report = convert_from_hf(source, tmp_path / "out", overwrite=True)
    assert report.bytes_resumed == report.bytes
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "old", "out", "whole"]


def test_an_empty_folder_is_filled(make_hf, tmp_path):
    (tmp_path / "out").mkdir()
    convert_from_hf(make_hf("dense"), tmp_path / "out")
    assert (tmp_path / "out/manifest.json").exists()


def test_full_disk(job, tmp_path, run, snapshot, monkeypatch):
    """The disk fills up in the middle of a chunk; the rest of the chunk finds no room."""
    convert, _, expected = job
    room = 20_000
    original = os.pwrite

    def pwrite(descriptor, buffer, offset):
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = original(descriptor, buffer[:room], offset)
        room -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "pwrite", pwrite)
        with pytest.raises(OSError, match=r"the disk of .*out.partial is full .* run the same command again"):
            convert()
    assert not (tmp_path / "out").exists()
    report = convert()
    assert report.bytes_resumed > 0
    assert snapshot(tmp_path / "out") == expected


def test_too_little_room_is_seen_at_once(make_hf, run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    status, _, error = run("from-hf", make_hf("dense"), tmp_path / "out")
    assert (status, "its disk has only 0.00 GB free" in error) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("limit", [200, 5_000, 100_000])
@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_file_size_limit(direction, limit, make_hf, tmp_path):
    """The system refuses to write more, wherever in a conversion that may be."""
    source = make_hf("dense", vocab_size=4096)
    if direction == "to-hf":
        convert_from_hf(source, tmp_path / "ours")
        source = tmp_path / "ours"
    code = (
        "import resource, sys; from convert.cli import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, direction, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"the disk of {tmp_path / 'out.partial'} is full (File too large)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_read_only_target(make_hf, run, tmp_path, monkeypatch):
    source = make_hf("dense")
    original = os.mkdir

    def mkdir(path, *arguments):
        if "out" in os.fspath(path):
            raise OSError(errno.EROFS, "Read-only file system", path)
        original(path, *arguments)

    monkeypatch.setattr(os, "mkdir", mkdir)
    status, _, error = run("from-hf", source, tmp_path / "out")
    assert (status, error.count("\n")) == (2, 1)
    assert f"cannot write to {tmp_path}: Read-only file system" in error


def _killed_then_repeated(command, out, draw):
    """Starts `command`, kills it at a random moment of its work, and runs it again to the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    receipts = out.with_name(f"{out.name}.partial") / ".receipts.jsonl"
    while process.poll() is None and not receipts.exists():
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return killed


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9(kills, make_hf, tmp_path, snapshot):
    """A model of 50 MB in some hundred files; both directions in turn."""
    source = make_hf("moe", dtype="float32", hidden_size=256, vocab_size=20_000, num_hidden_layers=8)
    convert_from_hf(source, tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "back", shard_size="10MB")
    expected = [snapshot(tmp_path / "ours"), snapshot(tmp_path / "back")]
    draw, killed = random.Random(time.time_ns()), 0
    for i in range(kills):
        out = tmp_path / f"out{i}"
        arguments = [["from-hf", source, out], ["to-hf", tmp_path / "ours", out, "--shard-size", "10MB"]][i % 2]
        killed += _killed_then_repeated([sys.executable, "-m", "convert", *arguments], out, draw)
        assert snapshot(out) == expected[i % 2]
        assert not (out / ".receipts.jsonl").exists()
        assert json.loads((out / ".conversion.json").read_bytes()).keys() == {"task", "files"}
    assert killed > 0
