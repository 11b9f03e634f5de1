"""The real program of a run, compiled for a TPU topology on a machine without TPUs, and what XLA says about it.

Nothing here imports JAX before `prepare` has run: libtpu reads its environment once, when JAX starts.
"""

import dataclasses
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sharding.planner import hlo
from sharding.planner.chips import Topology
from sharding.planner.hlo_flops import flops
from sharding.planner.request import Request
from sharding.planner.suspicions import suspicions

if TYPE_CHECKING:
    from jax.sharding import Mesh

Trace = Callable[[Request, "Mesh"], Any]
"""The program of a request on a mesh, traced: a `jax.stages.Traced`."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, as `memory_analysis` of the compiled program counts them."""

    arguments: int
    outputs: int
    temporaries: int
    """The heap that XLA lays out, its gaps counted twice."""
    aliased: int
    """Outputs that take the place of arguments."""
    peak: int
    """Arguments and everything else that is alive at the worst moment: what has to fit."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    memory: Memory
    collectives: list[hlo.Collective]
    flops: int
    """Of matrix products and kernels, on each device."""
    warnings: list[str]
    seconds: float
    """That it took to trace, lower and compile."""


def prepare(topology: Topology) -> None:
    """Sets the environment in which libtpu compiles for chips that are not there; JAX must not have started.

    Raises:
      ValueError: for GPUs, whose compiler needs a GPU, and if libtpu is not installed.
    """
    if topology.chip.kind != "tpu":
        raise ValueError(
            f"only TPU programs can be compiled here; for {topology} there is the formula: leave --compile out"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('compiling for TPUs needs libtpu, which is not installed: pip install "qwen2-jax[tpu]"')
    started = "jax" in sys.modules
    ready = os.environ.get("TPU_SKIP_MDS_QUERY") == "1"
    assert ready or not started, "JAX started before its environment was set"
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nobody owns a chip here
        JAX_PLATFORMS="cpu",
        TPU_ACCELERATOR_TYPE="v5p-8",  # of the machine that libtpu believes to be on, whatever it compiles for
        TPU_MIN_LOG_LEVEL=os.environ.get("TPU_MIN_LOG_LEVEL", "3"),
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
    )


def compile_request(request: Request, trace: Trace) -> Compiled:
    """Compiles a run for its topology; takes a minute or several, and gigabytes of host memory.

    Raises:
      ValueError: as `prepare`; if libtpu does not know the topology; if the program needs more memory than the chips
        have, which the compiler finds out too.
    """
    prepare(request.topology)
    import jax

    from qwen2_jax.target import tracing_for
    from sharding.mesh import make_mesh

    mesh = make_mesh(request.mesh, devices(request.topology))
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those about donated buffers are answered by `aliased`
        with tracing_for("tpu"):
            traced = trace(request, mesh)
        lowered = traced.lower(lowering_platforms=("tpu",))
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(_one_line(request.topology, error)) from None
    seconds = time.monotonic() - start
    return read(request, program.memory_analysis(), program.as_text(), seconds)


def devices(topology: Topology) -> list[Any]:
    """Stand-ins for the devices of a topology. Raises ValueError if libtpu does not know it."""
    import jax
    from jax.experimental import topologies

    # The two cores of a v4 chip work as one device, but libtpu has to be told.
    cores = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, num_slices=topology.slices, **cores
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu cannot compile for {topology}: {str(error).splitlines()[0]}") from None
    return list(described.devices)


def read(request: Request, memory: Any, text: str, seconds: float) -> Compiled:
    """What `memory_analysis()` and `as_text()` of the compiled program of a request say."""
    program, mesh = hlo.parse(text), request.mesh.sizes
    if request.task == "decode":
        program = hlo.one_trip(program)
    collectives = hlo.collectives(program, mesh)
    found = suspicions(request, program, collectives)
    used = Memory(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
    )
    chip = request.topology.chip
    if used.peak > chip.memory:
        found.insert(
            0, f"{used.peak / 1e9:.1f} GB are needed at the worst moment; {chip.name} has {chip.memory / 1e9:.1f}"
        )
    return Compiled(used, collectives, flops(program), found, seconds)


def _one_line(topology: Topology, error: Exception) -> str:
    """What a user can do about the compiler's refusal."""
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    if "RESOURCE_EXHAUSTED" in message:
        ways = "use more chips, a smaller batch, a remat policy that keeps less, or a mesh that splits more"
        return f"does not fit {topology}: {message.partition(': ')[2]} {ways}"
    return f"the compiler for {topology} failed: {message}"
