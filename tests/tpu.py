"""Programs compiled for TPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path


def run_for_tpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments in a process of its own: libtpu reads its environment when JAX starts."""
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody owns a chip here
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
