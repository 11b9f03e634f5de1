"""Long prefills are compiled for real TPU topologies, without a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_prefill.py"
TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody owns a chip here
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@pytest.mark.tpu
@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_131072_tokens_of_7b_fit_four_v5p_chips(implementation):
    root = SCRIPT.parents[2]
    environment = {**os.environ, **TPU, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, SCRIPT, implementation], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    total = report["arguments"] + report["outputs"] + report["temporaries"]
    assert total < 20 * 2**30  # of 95 GB; the 131,072 x 131,072 scores of one head alone would take 68
    assert (report["kernels"] > 0) == (implementation == "pallas")
