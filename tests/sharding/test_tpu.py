"""Long prefills are compiled for real TPU topologies, without a TPU."""

import json
from pathlib import Path

import pytest

from tests.tpu import run_for_tpu

SCRIPT = Path(__file__).parent / "compile_prefill.py"


@pytest.mark.tpu
@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_131072_tokens_of_7b_fit_four_v5p_chips(implementation):
    done = run_for_tpu(str(SCRIPT), implementation)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    total = report["arguments"] + report["outputs"] + report["temporaries"]
    assert total < 20 * 2**30  # of 95 GB; the 131,072 x 131,072 scores of one head alone would take 68
    assert (report["kernels"] > 0) == (implementation == "pallas")
