"""The formula beside what XLA says of the compiled programs."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from sharding.planner.estimate import estimate
from sharding.planner.request import make_request
from tests.tpu import run_for_tpu

# model, topology, mesh, task, rows, tokens, remat: arguments, and all that is alive at the worst moment
# (`memory_analysis().peak_memory_in_bytes`), of each device, as libtpu 0.0.41 or 0.0.50 compiled them.
MEASURED = {
    ("qwen2-0.5b", "v6e:4x4", "data=2,fsdp=8", "train", 64, 4096, "full"): (751_837_696, 3_346_762_496),
    ("qwen2-0.5b", "v5e:4x4", "data=2,fsdp=8", "train", 64, 4096, "full"): (751_837_696, 3_346_762_752),
    ("qwen2-0.5b", "v5p:2x2x1", "fsdp=4", "train", 32, 4096, "full"): (1_502_478_848, 4_939_884_288),
    ("qwen2-1.5b", "v5e:2x2", "fsdp=4", "train", 16, 4096, "full"): (4_632_941_056, 8_904_497_664),
    ("qwen2-1.5b", "v5p:2x2x1", "fsdp=4", "train", 32, 4096, "full"): (4_633_203_200, 10_843_967_744),
    ("qwen2-1.5b", "v6e:2x2", "fsdp=4", "train", 32, 4096, "full"): (4_633_203_200, 10_940_312_320),
    ("qwen2-7b", "v5p:2x2x1", "fsdp=4", "train", 8, 4096, "full"): (22_850_507_264, 33_302_257_952),
    ("qwen2-7b", "v5p:2x2x1", "fsdp=2,tensor=2", "train", 8, 4096, "full"): (22_849_778_176, 33_399_946_528),
    ("qwen2-7b", "v5e:8x8", "fsdp=64", "train", 256, 4096, "full"): (1_432_654_336, 9_457_127_936),
    ("qwen2-72b", "v5e:16x16", "fsdp=64,tensor=4", "train", 128, 4096, "full"): (3_426_423_296, 9_005_054_976),
    ("qwen2-72b", "v5p:4x4x8", "fsdp=16,tensor=8", "train", 128, 4096, "full"): (6_833_590_784, 17_713_823_008),
    ("qwen2-57b-a14b", "v5p:4x4x8", "fsdp=16,expert=8", "train", 128, 4096, "full"): (10_692_006_400, 21_640_780_128),
    ("qwen2-57b-a14b", "v5e:16x16", "fsdp=32,expert=8", "train", 256, 4096, "full"): (5_348_299_264, 14_275_995_648),
    ("qwen2-7b", "v5e:2x4", "data=2,tensor=4", "prefill", 8, 4096, "full"): (3_808_262_656, 4_793_160_704),
    ("qwen2-7b", "v5e:2x4", "data=2,tensor=4", "decode", 32, 4096, "full"): (4_748_264_960, 4_947_047_936),
    ("qwen2-7b", "v5e:2x4", "context=2,tensor=4", "decode", 32, 4096, "full"): (4_748_264_960, 5_869_793_792),
    ("qwen2-0.5b", "v5e:2x2", "data=4", "prefill", 8, 4096, "full"): (988_180_992, 1_373_158_912),
    ("qwen2-1.5b", "v5e:2x2", "data=2,tensor=2", "decode", 64, 4096, "full"): (3_424_024_064, 3_501_891_584),
    ("qwen2-72b", "v5p:2x2x1", "tensor=4", "prefill", 4, 4096, "full"): (36_355_148_288, 40_155_466_944),
    ("qwen2-72b", "v5e:4x4", "tensor=16", "decode", 16, 4096, "full"): (11_775_948_288, 14_462_804_480),
    ("qwen2-57b-a14b", "v5e:4x8", "expert=8,tensor=4", "decode", 32, 4096, "full"): (7_369_868_800, 10_639_448_064),
}


@pytest.mark.parametrize(("run", "measured"), MEASURED.items(), ids=[" ".join(map(str, run)) for run in MEASURED])
def test_memory_is_within_a_tenth_of_what_xla_says(run, measured):
    model, topology, mesh, task, batch, seq, remat = run
    memory = estimate(make_request(model, topology, mesh, task, batch, seq, remat)).memory
    arguments, peak = measured
    assert memory.arguments == pytest.approx(arguments, rel=2e-3)
    assert memory.total == pytest.approx(peak, rel=0.1)


def test_every_size_was_compiled_for_three_topologies():
    topologies = defaultdict(set)
    for model, topology, *_ in MEASURED:
        topologies[model].add(topology)
    assert set(topologies) == {"qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2-72b", "qwen2-57b-a14b"}
    assert all(len(found) >= 3 for found in topologies.values()), topologies


def test_the_document_shows_these_numbers():
    document = (Path(__file__).parents[3] / "docs" / "pods.md").read_text(encoding="utf-8")
    for (model, topology, mesh, task, batch, seq, _), (_, peak) in MEASURED.items():
        total = estimate(make_request(model, topology, mesh, task, batch, seq)).memory.total
        numbers = f"{total / 1e9:.2f} | {peak / 1e9:.2f} | {total / peak - 1:+.1%}"
        assert f"| {model} | {topology} | {mesh} | {task}, {batch} x {seq:,} | {numbers} |" in document


@pytest.mark.tpu
@pytest.mark.parametrize(
    "run",
    [
        "--mesh data=2,tensor=4 --task decode --batch 32",
        "--mesh context=2,tensor=4 --task decode --batch 32",
        pytest.param("--mesh data=2,tensor=4 --task prefill --batch 8", marks=pytest.mark.slow),
    ],
)
def test_a_program_compiled_now_is_what_the_formula_says(run):
    """That of `generate`: decoding writes into its cache, and no device ever gathers what others have of it."""
    argv = ["--model", "qwen2-7b", "--topology", "v5e:2x4", "--seq", "4096", *run.split()]
    done = run_for_tpu("-m", "sharding", *argv, "--compile", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    compiled = report["compiled"]
    assert compiled["memory"]["arguments"] == pytest.approx(report["memory"]["arguments"], rel=1e-3)
    assert compiled["memory"]["peak"] == pytest.approx(report["memory"]["total"], rel=0.1)
    assert compiled["flops"] == pytest.approx(report["flops"]["total"] / report["devices"], rel=1e-3)
    assert compiled["warnings"] == []
    used = {axis for one in compiled["collectives"] for axis in one["axes"]}
    assert used == {axis for axis, size in report["mesh"].items() if size > 1}
    gathered = [one["shape"] for one in compiled["collectives"] if one["kind"] == "all-gather"]
    assert all("152064" in shape or "38016" in shape for shape in gathered), gathered  # logits
    total = sum(one["bytes"] for one in compiled["collectives"])
    assert total == pytest.approx(sum(traffic["inside"] for traffic in report["traffic"].values()), rel=1e-3)
