"""A command that runs in several processes: one per host of a pod, one or more per machine with GPUs."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from qwen2_jax.command import keep_stdout


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """For runs of several processes on clusters that JAX does not know by itself."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """A free port of the first process."""
    processes: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """How many there are."""
    process: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Which one this is, from 0."""


def join(options: ProcessOptions) -> bool:
    """Joins the other processes of this run, if there are any; must come before anything that asks JAX for devices.

    With others, standard output is Python's alone from here on.

    Returns:
      Whether this is the first process, which alone writes.

    Raises:
      ValueError: for options that do not belong together.
    """
    import jax

    from sharding.processes import join_processes

    if join_processes(**dataclasses.asdict(options)):
        keep_stdout()
    return jax.process_index() == 0


def of_first(choices: Sequence[bool]) -> list[bool]:
    """What the first process says, in all of them: they must compute the same, and may not see the same files."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return list(choices)
    return [bool(choice) for choice in multihost_utils.broadcast_one_to_all(np.asarray(choices, np.int32))]


def same_everywhere(value: Any) -> bool:
    """Whether all processes have the same value, one that JSON can hold; all of them must ask."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return True
    own = np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.int32)
    return bool((multihost_utils.process_allgather(own) == own).all())
