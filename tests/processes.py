"""Commands that run in several processes together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.xla import QUICK_ENVIRONMENT


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_processes(arguments: list[object], count: int, devices: int, folder: Path) -> list[str]:
    """Runs `qwen2-jax` in so many processes of so many devices together, and gives what each printed."""
    address, root = free_address(), str(Path(__file__).parents[1])
    environment = {**os.environ, **QUICK_ENVIRONMENT, "PYTHONPATH": root, "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "qwen2_jax", *map(str, arguments)]
    joined = ["--coordinator", address, "--processes", str(count), "--process"]
    runs = [
        subprocess.Popen(
            [*command, *([*joined, str(process)] if count > 1 else [])],
            **{"env": environment, "cwd": folder, "text": True},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in range(count)
    ]
    try:
        ended = [run.communicate(timeout=900) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (_, errors) in zip(runs, ended, strict=True):
        assert run.returncode == 0, errors[-3000:]
    return [out for out, _ in ended]
