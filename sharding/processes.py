"""Runs of several processes: one per host of a TPU pod, one or more per machine with GPUs."""

import jax

_LEAVE_SECONDS = 3600  # the last one may still be reading a checkpoint again; JAX's default is 300


def join_processes(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, required: bool = False
) -> bool:
    """Joins the other processes of this run; `jax.devices()` are then those of all of them.

    Without arguments JAX looks for a cluster that it knows (a TPU pod, SLURM, Open MPI, Kubernetes) and takes addresses
    and numbers from there. Must be called before anything else asks JAX for devices.

    Args:
      coordinator: "host:port" of process 0, a free port there, for clusters that JAX does not know.
      processes: how many there are.
      process: which one this is, from 0.
      required: refuse to go on alone, as a run should that was started many times: if JAX failed to find its cluster,
        there would be as many runs of one process each.

    Returns:
      Whether there are others to join; False for a run on its own.

    Raises:
      ValueError: for arguments that do not belong together.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"coordinator, processes and process belong together; {' and '.join(missing)} is missing")
    if coordinator is None or processes is None or process is None:
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=_LEAVE_SECONDS)
        except ValueError as error:
            if "coordinator_address" not in str(error):
                raise
            if required:  # JAX knows no cluster here
                raise ValueError(
                    "JAX finds no cluster to join; pass coordinator (host:port of process 0), processes and process"
                ) from None
            return False
        return jax.process_count() > 1
    host, colon, port = coordinator.rpartition(":")
    if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator {coordinator!r} is not host:port; an example is 10.0.0.1:8476")
    if processes < 1:
        raise ValueError(f"there must be 1 process or more, got {processes}")
    if not 0 <= process < processes:
        raise ValueError(f"process must be from 0 to {processes - 1} for {processes} processes, got {process}")
    jax.distributed.initialize(coordinator, processes, process, shutdown_timeout_seconds=_LEAVE_SECONDS)
    return processes > 1


def leave_processes() -> None:
    """Waits until all processes of this run are through; none of them computes anything afterwards.

    Process 0 holds what keeps them together: if it ended before the others, JAX would abort those, done or not.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
