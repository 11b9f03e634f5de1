"""Settings that are read once, before JAX starts: what helps inference and evaluation on each platform, and whether the
installed JAX knows it.

An unknown flag ends the process as soon as JAX looks for devices, and flags come and go with releases. So each is tried
in a process of its own before it is set here.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple


class Setting(NamedTuple):
    variable: str
    """Of the environment: XLA_FLAGS and LIBTPU_INIT_ARGS hold many flags, any other one value."""
    value: str
    reason: str

    @property
    def is_flag(self) -> bool:
        return self.value.startswith("--")

    def __str__(self) -> str:
        return self.value if self.is_flag else f"{self.variable}={self.value}"


def _libtpu(flag: str, reason: str) -> Setting:
    return Setting("LIBTPU_INIT_ARGS", flag, reason)


RECOMMENDED: Mapping[str, tuple[Setting, ...]] = {
    "gpu": (
        Setting(
            "XLA_FLAGS",
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "with --mesh, collectives run behind products; nothing changes on one GPU. The rest of "
            "JAX_OPTIMIZATION_LEVEL=O1 is about loops over layers, which generation does not have",
        ),
        Setting(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            "0.9",
            "JAX takes three quarters of a GPU's memory unless told otherwise: more of it is larger batches",
        ),
    ),
    "tpu": (
        _libtpu("--xla_tpu_enable_async_collective_fusion=true", "collectives run behind products"),
        _libtpu("--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true", "also where weights are gathered"),
        _libtpu("--xla_tpu_overlap_compute_collective_tc=true", "the tensor cores go on meanwhile"),
        _libtpu("--xla_enable_async_all_gather=true", "a gather starts early and is waited for where it is read"),
    ),
    "cpu": (),
}
"""By platform. Not here: CUDA graphs (command buffers), which decoding needs and which XLA switches on by itself."""

_TRY = {
    # Devices are looked for, which reads XLA_FLAGS.
    "XLA_FLAGS": "import jax; jax.devices()",
    # libtpu reads its arguments when it starts; for a topology that is not there it needs no TPU.
    "LIBTPU_INIT_ARGS": (
        "import jax; from jax.experimental import topologies; jax.config.update('jax_platforms', 'cpu'); "
        "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
    ),
}
_SECONDS = 120


def platform_here(environment: Mapping[str, str] = os.environ) -> str:
    """The platform that JAX is going to start on, "gpu", "tpu" or "cpu", found out without starting it."""
    if asked := environment.get("JAX_PLATFORMS", "").partition(",")[0]:
        return {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
        return "gpu"
    tpu = any(Path(place).exists() for place in ("/dev/accel0", "/dev/vfio/0"))
    return "tpu" if tpu and importlib.util.find_spec("libtpu") else "cpu"


def accepted(setting: Setting, jax_platforms: str | None = None) -> bool:
    """Whether the installed JAX starts with a setting; tried in a process of its own, which takes a second or two.

    Args:
      setting: of `RECOMMENDED`, or any other.
      jax_platforms: JAX_PLATFORMS of that process; this one's by default. The flags of GPUs are known on CPUs too.
    """
    return not setting.is_flag or _starts(setting.variable, setting.value, jax_platforms)


@functools.cache
def _starts(variable: str, value: str, jax_platforms: str | None) -> bool:
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", variable: value}
    if jax_platforms is not None:
        environment["JAX_PLATFORMS"] = jax_platforms
    if variable == "LIBTPU_INIT_ARGS":
        if importlib.util.find_spec("libtpu") is None:
            return False
        environment["TPU_SKIP_MDS_QUERY"] = "1"  # nobody to ask on a machine without TPUs
    command = [sys.executable, "-c", _TRY[variable]]
    try:
        return subprocess.run(command, env=environment, capture_output=True, timeout=_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def set_recommended(
    environment: MutableMapping[str, str] = os.environ, platform: str | None = None
) -> tuple[list[Setting], list[Setting]]:
    """Puts the platform's settings into the environment: those that were set, and those that this JAX does not know.

    What the user has set already stays. JAX must not have started.

    Args:
      environment: to change.
      platform: "gpu", "tpu" or "cpu"; that of this machine by default.

    Raises:
      ValueError: if JAX is imported already, so that it might not see them.
    """
    if environment is os.environ and "jax" in sys.modules:
        raise ValueError("JAX is there already, and may have read its flags; set them before it is imported")
    done, unknown = [], []
    for setting in RECOMMENDED.get(platform or platform_here(environment), ()):
        before = environment.get(setting.variable, "")
        names = {flag.partition("=")[0] for flag in before.split()}
        if setting.value.partition("=")[0] in names if setting.is_flag else before:
            continue
        if not accepted(setting):
            unknown.append(setting)
            continue
        environment[setting.variable] = f"{before} {setting.value}".strip() if setting.is_flag else setting.value
        done.append(setting)
    return done, unknown
