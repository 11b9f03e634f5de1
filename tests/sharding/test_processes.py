"""Two processes with four devices each compute what one device computes; how processes find each other."""

import contextlib
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from convert import save_checkpoint
from convert.conversion import convert_to_hf
from qwen2_jax.model import unstack_layers
from sharding.processes import join_processes
from tests.processes import free_address
from tests.sharding.models import MODELS, parameters
from tests.sharding.run_two_processes import LOADS, MESHES
from tests.xla import QUICK_ENVIRONMENT

HERE = Path(__file__).parent


def run_two(script, arguments, environment, timeout):
    """(exit status, standard output, standard error) of two processes with four devices each, run side by side."""
    common = {
        **os.environ,
        **QUICK_ENVIRONMENT,
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, HERE / script, *arguments(process)],
            env={**common, **environment(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    # Both are read at once, lest one waits for its output to be taken and the other one for it.
    try:
        with ThreadPoolExecutor() as pool:
            ended = list(pool.map(lambda run: run.communicate(timeout=timeout), runs))
    finally:
        for run in runs:
            run.kill()
    return [(run.returncode, *texts) for run, texts in zip(runs, ended, strict=True)]


@pytest.mark.slow
def test_two_processes_equal_one_device(tmp_path):
    """Also in what they load: 12 meshes for dense and for MoE models, plain and dual-chunk."""
    cases = [(name, spec) for name, meshes in MESHES.items() for spec in meshes]
    assert len(cases) == 2 * 2 * 12
    config = MODELS["dense"]
    save_checkpoint(tmp_path / "ours", config, unstack_layers(parameters(config), config))
    convert_to_hf(tmp_path / "ours", tmp_path / "hf")
    address, folders = free_address(), (tmp_path / "ours", tmp_path / "hf")
    ended = run_two("run_two_processes.py", lambda process: (address, str(process), *folders), lambda _: {}, 3600)
    for status, out, errors in ended:
        assert status == 0, errors[-3000:]
        assert out.count("equal:") == 2 * len(LOADS) + 1 + len(cases)


def slurm(job, process):
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def open_mpi(job, process):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
    }


def free_job():
    """The number of a job for which the port that JAX makes of it, 61440 and its last 12 bits, is free."""
    for job in range(os.getpid() % 4096, 4096):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 61440 + job))
            return job
    raise AssertionError("no port is free")


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [slurm, open_mpi])
def test_processes_of_a_cluster_find_each_other(cluster):
    """By what srun and mpirun put into the environment, without a flag."""
    job = free_job()
    ended = run_two("run_joining.py", lambda _: (), lambda process: cluster(job, process), 300)
    for process, (status, out, errors) in enumerate(ended):
        assert status == 0, errors[-3000:]
        assert out.split() == [str(process), "2", "8"]


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
