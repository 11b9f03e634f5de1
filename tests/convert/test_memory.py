"""Memory stays within what the user allows, whatever the model's size."""

import dataclasses
import os
import subprocess
import sys

import pytest

from benchmarks.checkpoints import write_random
from qwen2_jax.sizes import SHAPE_1_5B, SHAPE_7B, SHAPE_A2_7B

PEAK = (
    "import sys; from benchmarks.machine import peak_memory; from convert.cli import main; "
    "status = main(sys.argv[1:]); print(peak_memory()); sys.exit(status)"
)


def peak_bytes(*arguments):
    """Peak resident memory of one `qwen2-jax convert` process."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(SHAPE_1_5B, num_hidden_layers=18), dataclasses.replace(SHAPE_A2_7B, num_hidden_layers=1)],
    ids=["dense", "moe"],
)
def test_two_gigabytes_in_half_of_one(config, tmp_path, run):
    total = write_random(tmp_path / "hf", config, "bfloat16", shard_size=10**9)
    assert total >= 2e9
    limit = ["--max-host-memory", "512MB"]
    assert peak_bytes("from-hf", tmp_path / "hf", tmp_path / "ours", *limit) < 512e6
    assert peak_bytes("to-hf", tmp_path / "ours", tmp_path / "back", "--shard-size", "1GB", *limit) < 512e6
    for path in (tmp_path / "hf").iterdir():
        subprocess.run(["cmp", path, tmp_path / "back" / path.name], check=True)
    assert peak_bytes("from-hf", tmp_path / "hf", tmp_path / "wide", "--dtype", "float32", *limit) < 512e6


LOADING = """
import sys
import jax
from benchmarks.machine import peak_memory
from convert import load_checkpoint
from sharding import make_mesh

mesh = make_mesh("fsdp=8")
jax.block_until_ready(jax.numpy.ones(1))
before = peak_memory()
_, params = load_checkpoint(sys.argv[1], mesh=mesh, stacked=True, max_host_memory=sys.argv[2])
print(peak_memory() - before)
"""


@pytest.mark.slow
def test_loading_takes_little_more_than_the_parameters(tmp_path):
    """On CPU devices the parameters are in the same memory, 856 MB here; no leaf is larger than the limit."""
    config = dataclasses.replace(SHAPE_1_5B, num_hidden_layers=7, vocab_size=65536)
    total = write_random(tmp_path / "hf", config, "bfloat16", shard_size=10**9)
    assert total > 0.8e9
    command = [sys.executable, "-c", LOADING, tmp_path / "hf", "200MB"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert total < int(done.stdout) < total + 200e6


@pytest.mark.slow
@pytest.mark.parametrize("reinit", ["unit", "entry"])
def test_upcycling(reinit, tmp_path):
    """One layer of Qwen2-7B becomes one with 24 experts of Qwen2-57B-A14B; a dense matrix of 136 MB stays in memory."""
    total = write_random(
        tmp_path / "hf", dataclasses.replace(SHAPE_7B, num_hidden_layers=1, vocab_size=1024), "bfloat16"
    )
    assert total > 410e6
    sizes = ["--experts", 24, "--top-k", 8, "--expert-width", 2560, "--shared-width", 20480, "--reinit", reinit]
    assert peak_bytes("upcycle", tmp_path / "hf", tmp_path / "moe", *sizes, "--max-host-memory", "410MB") < 410e6
