"""What refuses a run before anything is compiled, on every chip that the planner knows."""

import dataclasses
import re
import shlex
from types import SimpleNamespace

import pytest

from qwen2_jax.sizes import published
from sharding.mesh import MeshSpec
from sharding.planner.chips import CHIP_OF_KIND, CHIPS
from tests.train.runs import RandomRows
from train.preflight import check_run
from train.run_file import read_run


def check(argv: str, count: int, kind: str, file: object = None) -> None:
    run = read_run([*([] if file is None else [str(file)]), *shlex.split(argv)])
    config = published(run.start.model)
    devices = [SimpleNamespace(device_kind=kind)] * count
    check_run(run, [config] * len(run.stretches), MeshSpec.parse(run.compute.mesh).resolve(count), devices)


@pytest.mark.parametrize("kind", CHIP_OF_KIND)
@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_run_that_fits(kind, count):
    check(f"--model qwen2-0.5b --batch {count}", count, kind)


@pytest.mark.parametrize("kind", CHIP_OF_KIND)
@pytest.mark.parametrize("count", [1, 4, 12, 16])
def test_one_that_does_not(kind, count):
    """A slice's shape is nobody's business here: 12 devices are as good as 16."""
    chip = CHIPS[CHIP_OF_KIND[kind]]
    batch = 256 * count if chip.memory < 60e9 else 2048 * count
    argv = f"--model qwen2-0.5b --mesh data=-1 --batch {batch} --remat none"
    with pytest.raises(ValueError, match=f"the run does not fit: a device needs .* GB, a {chip.name} has") as refused:
        check(argv, count, kind)
    message = str(refused.value)
    assert "\n" not in message and "--no-plan starts all the same" in message
    assert "--accumulate" in message and "--batch" in message
    follow(message, argv, count, kind)
    check(f"{argv} --no-plan", count, kind)


MODELS = {
    "qwen2-7b on one": ("--model qwen2-7b --batch 1", 1, "TPU v5p", ["--moments-dtype", "devices and --mesh fsdp=2"]),
    "qwen2-72b": ("--model qwen2-72b --batch 16", 16, "TPU v4", ["64 devices and --mesh fsdp=64"]),
    "qwen2-57b-a14b": (
        "--model qwen2-57b-a14b --batch 8",
        8,
        "NVIDIA H100 80GB HBM3",
        ["16 devices and --mesh fsdp=16"],
    ),
    "split badly": ("--model qwen2-7b --mesh data=16 --batch 16", 16, "TPU v5 lite", ["--mesh fsdp=16"]),
    "moments": (
        "--model qwen2-7b --batch 1 --moments-dtype bfloat16",
        1,
        "TPU v5",
        ["--second-moments-dtype bfloat16"],
    ),
}


@pytest.mark.parametrize(("argv", "count", "kind", "ways"), MODELS.values(), ids=MODELS)
def test_the_ways_out_are_flags_of_this_command(argv, count, kind, ways):
    with pytest.raises(ValueError) as refused:
        check(argv, count, kind)
    for way in ways:
        assert way in str(refused.value)
    follow(str(refused.value), argv, count, kind)


def follow(message: str, argv: str, count: int, kind: str) -> None:
    """Each of the ways out that a message names leads out."""
    ways = re.search("it would fit with (.*); --no-plan", message)[1].split(", or ")
    for way in ways:
        devices, also = re.fullmatch(r"(?:(\d+) devices and )?(--.*)", way).groups()
        check(f"{argv} {also}", int(devices or count), kind)


def test_phases_are_looked_at_one_by_one(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: qwen2-0.5b\nmesh: fsdp=4\nphases:\n- {steps: 1, batch: 4}\n- {steps: 1, batch: 4096, seq: 32768}\n"
    )
    with pytest.raises(ValueError, match=r"phase 2 does not fit.*accumulate \d+, or batch: \d+ in phase 2"):
        check("", 4, "TPU v5 lite", file)


def test_what_does_not_divide_comes_first():
    for argv, complaint in (
        ("--batch 6 --accumulate 4", "a batch of 6 rows does not divide into 4 parts"),
        ("--batch 6", "a batch of 6 rows does not divide over data x fsdp x expert = 4; use 4 or 8"),
        ("--batch 4 --seq 200000", "give --seq 131072 or less"),
    ):
        with pytest.raises(ValueError, match=complaint):
            check(f"--model qwen2-7b {argv} --no-plan", 4, "TPU v5p")


def test_unknown_devices_are_not_judged():
    check("--model qwen2-72b --batch 1", 1, "cpu")


def test_training_asks_before_it_compiles(train_run, monkeypatch, tmp_path):
    """The devices here are 8 CPUs, made out to be chips of a kilobyte."""
    tiny = dataclasses.replace(CHIPS["v5p"], memory=1024)
    monkeypatch.setattr("train.preflight.chip_of", lambda kind: tiny)
    with pytest.raises(ValueError, match="the run does not fit: a device needs 0.0 GB"):
        train_run(tmp_path / "run", rows=lambda number, phase: RandomRows(phase.seq))
    assert not (tmp_path / "run").exists()
