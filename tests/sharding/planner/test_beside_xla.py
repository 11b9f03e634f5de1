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
    ("qwen2-0.5b", "v6e:4x4", "fsdp=16", "train", 64, 4096, "full"): (404_825_088, 2_643_146_976),
    ("qwen2-0.5b", "v5e:4x4", "fsdp=16", "train", 64, 4096, "full"): (404_828_672, 2_642_109_440),
    ("qwen2-0.5b", "v5p:2x2x1", "fsdp=4", "train", 32, 4096, "full"): (1_502_216_704, 4_626_622_720),
    ("qwen2-1.5b", "v5e:2x2", "fsdp=4", "train", 16, 4096, "full"): (4_632_806_400, 8_904_552_960),
    ("qwen2-1.5b", "v5p:2x2x1", "fsdp=4", "train", 32, 4096, "full"): (4_632_941_056, 10_843_571_968),
    ("qwen2-1.5b", "v6e:2x2", "fsdp=4", "train", 32, 4096, "full"): (4_632_941_056, 10_939_916_544),
    ("qwen2-7b", "v5p:2x2x1", "fsdp=4", "train", 8, 4096, "full"): (22_850_441_728, 33_302_165_248),
    ("qwen2-7b", "v5p:2x2x1", "fsdp=2,tensor=2", "train", 8, 4096, "full"): (22_849_643_520, 33_726_861_024),
    ("qwen2-7b", "v5e:8x8", "fsdp=64", "train", 256, 4096, "full"): (1_432_523_264, 9_456_928_768),
    ("qwen2-72b", "v5e:16x16", "fsdp=64,tensor=4", "train", 128, 4096, "full"): (3_426_354_176, 9_029_062_144),
    ("qwen2-72b", "v5p:4x4x8", "fsdp=16,tensor=8", "train", 128, 4096, "full"): (6_833_325_056, 17_713_416_416),
    ("qwen2-57b-a14b", "v5p:4x4x8", "fsdp=16,expert=8", "train", 128, 4096, "full"): (10_691_973_632, 21_640_724_320),
    ("qwen2-57b-a14b", "v5e:16x16", "fsdp=32,expert=8", "train", 256, 4096, "full"): (5_348_266_496, 14_275_940_352),
    ("qwen2-7b", "v5e:2x4", "data=2,tensor=4", "prefill", 8, 4096, "full"): (4_043_260_416, 4_551_524_864),
    ("qwen2-7b", "v5e:2x4", "data=2,tensor=4", "decode", 32, 4096, "full"): (4_748_231_680, 5_724_142_592),
    ("qwen2-0.5b", "v5e:2x2", "data=4", "prefill", 8, 4096, "full"): (1_088_883_200, 1_174_223_360),
    ("qwen2-1.5b", "v5e:2x2", "data=2,tensor=2", "decode", 64, 4096, "full"): (3_423_933_440, 5_312_720_384),
    ("qwen2-72b", "v5p:2x2x1", "tensor=4", "prefill", 4, 4096, "full"): (37_697_454_592, 38_788_721_696),
    ("qwen2-72b", "v5e:4x4", "tensor=16", "decode", 16, 4096, "full"): (11_775_640_576, 14_516_061_184),
    ("qwen2-57b-a14b", "v5e:4x4", "expert=4,tensor=4", "decode", 32, 4096, "full"): (10_687_661_056, 11_378_953_728),
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
def test_a_program_compiled_now_is_what_the_formula_says():
    argv = "--model qwen2-7b --topology v5e:2x4 --mesh data=2,tensor=4 --task prefill --batch 8 --seq 4096".split()
    done = run_for_tpu("-m", "sharding", *argv, "--compile", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    compiled = report["compiled"]
    assert compiled["memory"]["arguments"] == pytest.approx(report["memory"]["arguments"], rel=1e-3)
    assert compiled["memory"]["peak"] == pytest.approx(report["memory"]["total"], rel=0.1)
    assert compiled["flops"] == pytest.approx(report["flops"]["total"] / report["devices"], rel=0.03)
    assert any(collective["axes"] == ["tensor"] for collective in compiled["collectives"])
