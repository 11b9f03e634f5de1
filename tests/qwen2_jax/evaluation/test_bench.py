"""`qwen2-jax evaluate bench` at a toy size, where its numbers mean nothing, and what it counts."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import sizes, xla_flags
from qwen2_jax.commands import evaluate_bench
from qwen2_jax.evaluation import bench, memory
from qwen2_jax.model import abstract_params, init_params
from qwen2_jax.sizes import published

LENGTHS = ["--prompt-length", 8, "--new-tokens", 4, "--prefill-length", 32, "--questions", 2, "--repeats", 2]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(bench.COPIED, "cpu", 2**20)
    monkeypatch.setitem(bench.MULTIPLIED, "cpu", 64)
    monkeypatch.setattr(bench, "_LEAST_SECONDS", 0.001)


@pytest.fixture
def tiny(config, monkeypatch):
    monkeypatch.setitem(sizes.PUBLISHED, "tiny", config)
    return "tiny"


def test_report_of_random_weights(run, tiny, config, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--size", tiny, "--batches", 1, 3, *LENGTHS, "--compare", "none", "--out", file]
    code, out, err = run("bench", *arguments)
    assert code == 0, err
    # What it takes is said before anything else.
    assert out.startswith("batch of 3: ") and "free on each device" in out.splitlines()[0]
    assert "decode, batch 3" in out and "GB/s" in out

    report = json.loads(file.read_text())
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    assert report["dtype"] == "bfloat16" and report["transformers"] is None
    assert report["device"]["platform"] == "cpu" and report["versions"]["jax"] == jax.__version__
    assert report["xla_flags"]["recommended"] == []
    assert report["ceilings"]["copy"] > 0 and report["ceilings"]["matmul"] > 0
    assert report["memory"]["needed"]["batch of 3"]["weights"] == 2 * report["parameters"]
    prefill, one, three, scores = report["results"]
    assert prefill["measure"] == "prefill" and prefill["tokens"] == 32 and prefill["attention"] == "dense"
    assert prefill["share_of_matmul"] == pytest.approx(
        prefill["flops"] / prefill["seconds"] / report["ceilings"]["matmul"]
    )
    assert (one["batch"], three["batch"]) == (1, 3) and len(three["samples"]) == 2
    assert three["tokens_per_second"] == pytest.approx(3 * 4 / three["seconds"])
    assert three["compile_seconds"] > 0
    assert three["bytes_per_step"] == bench.decode_bytes(config, "bfloat16", 3, 10)
    assert scores["requests"] == 8 and scores["tokens_given"] > scores["tokens_computed"] > 0


@pytest.mark.torch
def test_checkpoint_beside_transformers(run, model, config):
    code, out, err = run("bench", "--model", model, "--batches", 2, *LENGTHS, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["dtype"] == "float32"
    assert report["transformers"]["device"] == "cpu" and report["transformers"]["versions"]["torch"]
    prefill, decode, scores = report["results"]
    assert prefill["ratio"] > 0 and decode["ratio"] > 0 and "ratio" not in scores
    assert decode["ratio"] == pytest.approx(decode["tokens_per_second"] / decode["transformers_tokens_per_second"])


@pytest.mark.slow
def test_on_a_mesh(run, tiny):
    mesh = ["--mesh", "data=4,tensor=2", "--attention", "chunked", "--dtype", "float32"]
    code, out, err = run("bench", "--size", tiny, "--batches", 4, *LENGTHS, *mesh, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["device"]["count"] == 8 and report["transformers"] is None
    assert report["memory"]["needed"]["batch of 4"]["weights"] < 4 * report["parameters"]
    assert {result["attention"] for result in report["results"]} == {"chunked", "dense"}


def test_refusals(run, refused, tiny, model, tmp_path, monkeypatch):
    refused("bench", because="one of --size NAME")
    refused("bench", "--size", tiny, "--model", model, because="one of --size NAME")
    refused("bench", "--size", "qwen3", because="unknown model 'qwen3'")
    refused("bench", "--size", tiny, "--batches", 0, because="--batches must be at least 1, got 0")
    refused("bench", "--size", tiny, "--repeats", 0, because="--repeats must be at least 1")
    refused("bench", "--size", tiny, because="--prefill-length need 4096 positions, the model has 128")
    refused("bench", "--size", tiny, "--out", tmp_path / "none" / "x.json", because="there is no folder")
    refused("bench", "--size", tiny, "--xla-flags", "recommended", because="JAX is there already")
    monkeypatch.setattr("qwen2_jax.commands.evaluate_bench._missing", list)  # PyTorch, say, where it is
    on_mesh = ["--mesh", "data=8", "--compare", "transformers"]
    code, _, err = run("bench", "--size", tiny, *LENGTHS, *on_mesh)
    assert (code, err.count("\n")) == (2, 1) and "not on TPUs or a mesh" in err


@pytest.mark.parametrize(
    "free, because",
    [
        (10_000, "the weights of tiny take"),
        (150_000, "the largest that fits is"),
    ],
)
def test_what_does_not_fit_is_refused(run, tiny, monkeypatch, free, because):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    code, out, err = run("bench", "--size", tiny, *LENGTHS, "--batches", 1, 64)
    assert code == 2 and because in err and err.count("\n") == 1
    assert out.count("\n") == 2  # the two lines of memory, and nothing was measured
    if "largest" in because:
        fits = err.strip().rpartition(" ")[2]
        code, _, err = run("bench", "--size", tiny, *LENGTHS, "--batches", int(fits) + 1)
        assert code == 2 and f"--batches {fits}\n" in err


def test_cost_is_that_of_the_planner():
    """The same arithmetic, written for another purpose."""
    from sharding.planner.chips import CHIPS, Topology
    from sharding.planner.request import MeshSpec, Request
    from sharding.planner.spread import Spread
    from sharding.planner.work import flops

    for name in ("qwen2-0.5b", "qwen2-7b", "qwen2-57b-a14b"):
        config = published(name)
        place = Topology(CHIPS["H100"], (1,))
        need = flops(Spread(Request("", config, place, MeshSpec(), "prefill", batch=1, seq=4096)))
        assert bench.cost_of(config).prefill(4096) == pytest.approx(need.model, rel=1e-3)


def test_decode_reads_weights_and_cache():
    seven = published("qwen2-7b")
    assert bench.decode_bytes(seven, "bfloat16", 1, 0) == pytest.approx(14.14e9, rel=1e-3)  # all but the embedding
    assert bench.decode_bytes(seven, "bfloat16", 1, 100) - bench.decode_bytes(seven, "bfloat16", 1, 0) == 100 * 57344
    sparse = published("qwen2-57b-a14b")
    assert bench.decode_bytes(sparse, "bfloat16", 1, 0) == pytest.approx(27.4e9, rel=0.02)
    many = bench.decode_bytes(sparse, "bfloat16", 1000, 0)
    assert many == pytest.approx(2 * 57.4e9, rel=0.02)


def test_random_params_are_like_those_of_init(config):
    ours = bench.random_params(config, jnp.bfloat16)
    reference = init_params(config, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), path
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.std() == pytest.approx(other.std(), rel=0.35), path
        assert one.mean() == pytest.approx(other.mean(), abs=0.1)
    assert not np.array_equal(ours["layers_0"]["mlp"]["up"]["kernel"], ours["layers_1"]["mlp"]["up"]["kernel"])


def test_choices():
    pairs = bench.choices(64, 1000)
    assert len(pairs) == 256
    assert max(len(context) + len(continuation) for context, continuation in pairs) <= 450 + 140 + 1
    letters = [context for context, continuation in pairs if len(continuation) == 1]
    assert len({tuple(context[:450]) for context in letters}) == 2
    short = bench.choices(4, 1000, max_length=100)
    assert max(len(context) + len(continuation) for context, continuation in short) <= 100


def test_needs_of_a_batch(config):
    whole = memory.batch_needs(config, "float32", 100, 4, 32, 16)
    assert whole.weights == 100 and whole.total == sum(whole)
    assert memory.batch_needs(config, "float32", 100, 4, 32, 16, at_once=64).activations < whole.activations
    half = memory.batch_needs(config, "float32", 100, 4, 32, 16, tensor=2)
    assert half.cache == whole.cache / 2 and half.activations < whole.activations
    assert memory.slot_bytes(published("qwen2-7b"), "bfloat16")[1] == 57344


def test_largest():
    assert bench.largest(lambda number: number <= 5, [1, 64]) == 5
    assert bench.largest(lambda number: True, [3, 2]) == 3
    assert bench.largest(lambda number: False, [3]) == 0


def known_here(setting):
    # The flags of GPUs stand in the same table of every jaxlib; those of TPUs are libtpu's.
    return setting.variable != "LIBTPU_INIT_ARGS"


@pytest.mark.parametrize("setting", [*filter(known_here, sum(xla_flags.RECOMMENDED.values(), ()))], ids=str)
def test_recommended_settings_are_known(setting):
    assert setting.reason
    assert xla_flags.accepted(setting, "cpu")


@pytest.mark.tpu
@pytest.mark.parametrize("setting", xla_flags.RECOMMENDED["tpu"], ids=str)
def test_recommended_settings_of_tpus_are_known(setting):
    assert xla_flags.accepted(setting, "cpu")


def test_unknown_flags_are_left_out(monkeypatch):
    wrong = xla_flags.Setting("XLA_FLAGS", "--xla_gpu_no_such_flag=1", "")
    right = xla_flags.Setting("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true", "")
    monkeypatch.setattr(xla_flags, "RECOMMENDED", {"gpu": (wrong, right)})
    environment = {"XLA_FLAGS": "--xla_dump_to=x"}
    assert xla_flags.set_recommended(environment, "gpu") == ([right], [wrong])
    assert environment["XLA_FLAGS"] == f"--xla_dump_to=x {right.value}"
    # What stands there already stays.
    environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"}
    assert xla_flags.set_recommended(environment, "gpu") == ([], [wrong])
    assert environment["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=false"


def test_a_flag_is_known_by_its_whole_name(monkeypatch):
    short = xla_flags.Setting("XLA_FLAGS", "--xla_tpu_enable_async_collective_fusion=true", "")
    monkeypatch.setattr(xla_flags, "RECOMMENDED", {"tpu": (short,)})
    monkeypatch.setattr(xla_flags, "accepted", lambda setting: True)
    environment = {"XLA_FLAGS": "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false"}
    assert xla_flags.set_recommended(environment, "tpu") == ([short], [])
    assert environment["XLA_FLAGS"].split() == [
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false",
        "--xla_tpu_enable_async_collective_fusion=true",
    ]
    assert xla_flags.set_recommended(environment, "tpu") == ([], [])


def test_platform_here():
    assert xla_flags.platform_here({"JAX_PLATFORMS": "cuda,cpu"}) == "gpu"
    assert xla_flags.platform_here({"JAX_PLATFORMS": "tpu"}) == "tpu"
    assert xla_flags.platform_here({"JAX_PLATFORMS": "cpu"}) == "cpu"


def test_the_command_line_is_read_without_jax():
    program = (
        "import sys; from qwen2_jax.commands import evaluate_bench as b; from qwen2_jax.command import parse\n"
        "parse(b.Options, ['--size', 'qwen2-7b', '--xla-flags', 'recommended'], 'x'); assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluate_bench.Options(size="qwen2-7b").size = "other"  # type: ignore[misc]
