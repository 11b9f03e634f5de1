"""Memory stays within what the user allows, whatever the model's size."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from convert.chunks import chunk_shape, chunks_of
from convert.hugging_face import HuggingFaceSink
from convert.names import arrays_of
from qwen2_jax.sizes import SHAPE_1_5B, SHAPE_A2_7B

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PEAK = (
    "import sys; from convert.cli import main; status = main(sys.argv[1:]); "
    "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]); sys.exit(status)"
)


def write_large(folder, config):
    """A folder of random weights that was never in memory as a whole; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "torch_dtype": "bfloat16"}))
    arrays = arrays_of(config)
    sink = HuggingFaceSink(folder, arrays, dict.fromkeys(arrays, BFLOAT16), 10**9)
    pool = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(BFLOAT16)
    total = 0
    for path, array in arrays.items():
        for chunk in chunks_of(array.shape, chunk_shape(array.shape, 2)):
            size = chunk.stop - chunk.start
            start = chunk.start % (pool.size - size)
            sink.write(path, chunk, pool[start : start + size])
            total += 2 * size
    sink.finish()
    return total


def peak_bytes(*arguments):
    """Peak resident memory of one `qwen2-jax convert` process."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(SHAPE_1_5B, num_hidden_layers=18), dataclasses.replace(SHAPE_A2_7B, num_hidden_layers=1)],
    ids=["dense", "moe"],
)
def test_two_gigabytes_in_half_of_one(config, tmp_path, run):
    total = write_large(tmp_path / "hf", config)
    assert total >= 2e9
    limit = ["--max-host-memory", "512MB"]
    assert peak_bytes("from-hf", tmp_path / "hf", tmp_path / "ours", *limit) < 512e6
    assert peak_bytes("to-hf", tmp_path / "ours", tmp_path / "back", "--shard-size", "1GB", *limit) < 512e6
    for path in (tmp_path / "hf").iterdir():
        subprocess.run(["cmp", path, tmp_path / "back" / path.name], check=True)
    assert peak_bytes("from-hf", tmp_path / "hf", tmp_path / "wide", "--dtype", "float32", *limit) < 512e6
