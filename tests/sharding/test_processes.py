"""Two processes with four devices each compute what one device computes; how processes find each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from convert import save_checkpoint
from qwen2_jax.model import unstack_layers
from sharding.processes import join_processes
from tests.sharding.models import MODELS, parameters
from tests.sharding.run_two_processes import CASES

SCRIPT = Path(__file__).parent / "run_two_processes.py"


@pytest.mark.slow
def test_two_processes_equal_one_device(tmp_path):
    config = MODELS["dense"]
    save_checkpoint(tmp_path / "model", config, unstack_layers(parameters(config), config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, SCRIPT, address, str(process), tmp_path / "model"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    ended = [(run, *run.communicate(timeout=600)) for run in runs]
    for run, out, errors in ended:
        assert run.returncode == 0, errors[-3000:]
        assert out.count("equal:") == len(CASES) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1:80", None, None), "processes and process is missing"),
        (("10.0.0.1:80", 2, None), "belong together; process is missing"),
        (("10.0.0.1", 2, 0), "'10.0.0.1' is not host:port"),
        (("host:99999", 2, 0), "is not host:port"),
        (("10.0.0.1:80", 0, 0), "there must be 1 process or more, got 0"),
        (("10.0.0.1:80", 2, 2), "process must be from 0 to 1 for 2 processes, got 2"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        join_processes(*arguments)


def test_alone(monkeypatch):
    """Where JAX knows no cluster, a run is on its own."""

    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert not join_processes()
    with pytest.raises(ValueError, match="finds no cluster to join; pass coordinator"):
        join_processes(required=True)
