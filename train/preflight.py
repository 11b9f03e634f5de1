"""Whether a run can be what it asks to be, by arithmetic, before anything is compiled: what divides, and what fits.

Only memory is looked at, which does not depend on how chips are connected: nobody has to know which slice they are.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from qwen2_jax.config import Qwen2Config
from sharding.checks import check_divides
from sharding.mesh import MeshSpec
from sharding.planner.chips import Topology, chip_of
from sharding.planner.memory import memory
from sharding.planner.request import REMATS, Request, checked
from sharding.planner.search import all_meshes
from sharding.planner.spread import Spread
from train.run import Phase, Run

_MOST_TIMES = 64
"""As many devices are tried as there are, up to so many times."""

_Change = tuple[str, Request]
"""What the change is, as the command line of `train` spells it, and the phase with it."""


def check_run(run: Run, configs: Sequence[Qwen2Config], spec: MeshSpec, devices: Sequence[Any]) -> None:
    """Refuses a run whose batches, rows or model do not divide, or that needs more memory than its devices have.

    Args:
      run: its options.
      configs: the model in each phase.
      spec: the mesh, without -1.
      devices: all of them; of which kind the planner does not know, their memory is not checked.

    Raises:
      ValueError: one line, with what would do instead.
    """
    for number, (config, phase) in enumerate(zip(configs, run.stretches, strict=True)):
        assert phase.batch is not None and phase.seq is not None and phase.accumulate is not None
        if phase.batch % phase.accumulate:
            raise ValueError(
                f"a batch of {phase.batch} rows does not divide into {phase.accumulate} parts; change one of them"
            )
        check_divides(config, spec, phase.batch // phase.accumulate, phase.seq)
        if config.max_length is not None and phase.seq > config.max_length:
            raise ValueError(
                f"the model has positions for {config.max_length} tokens, and rows would have {phase.seq}; give --seq "
                f"{config.max_length} or less"
            )
        if not run.compute.no_plan:
            _check_memory(run, number, config, spec, devices)


def _check_memory(run: Run, number: int, config: Qwen2Config, spec: MeshSpec, devices: Sequence[Any]) -> None:
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return
    how, phase = run.optimization, run.stretches[number]
    assert phase.batch is not None and phase.seq is not None and phase.accumulate is not None
    request = Request(
        run.start.model or run.start.init or "",
        config,
        Topology(chip, (len(devices),)),
        spec,
        "train",
        phase.batch // phase.accumulate,
        phase.seq,
        run.compute.remat,
        accumulates=phase.accumulate > 1,
        params_bytes=4 if how.params_dtype == "float32" else 2,
        moments=(jnp.dtype(how.moments_dtype).itemsize, jnp.dtype(how.second_moments_dtype).itemsize),
    )
    if (need := _need(request)) > chip.memory:
        ways = ways_to_fit(run, number, request)
        advice = f"it would fit with {', or '.join(ways)}" if ways else "no single change makes it fit"
        which = f"phase {number + 1}" if run.phases else "the run"
        raise ValueError(
            f"{which} does not fit: a device needs {need / 1e9:.1f} GB, a {chip.name} has {chip.memory / 1e9:.1f}; "
            f"{advice}; --no-plan starts all the same"
        )


def _need(request: Request) -> int:
    """Bytes of a device at the worst moment of a step."""
    return memory(Spread(request)).total


def ways_to_fit(run: Run, number: int, request: Request) -> list[str]:
    """Single changes of a phase, by its number from 0, after which it fits: the least one of each kind that helps."""
    phase = run.stretches[number]
    own = run.phases[number] if run.phases else Phase(phase.steps)

    def spelled(option: str, value: int) -> str:
        """A flag, unless the run file's phase would prevail over it."""
        return f"--{option} {value}" if getattr(own, option) is None else f"{option}: {value} in phase {number + 1}"

    def parts() -> Iterator[_Change]:
        assert phase.batch is not None and phase.accumulate is not None
        for count in range(phase.accumulate + 1, phase.batch + 1):
            if phase.batch % count == 0:
                rows = phase.batch // count
                yield spelled("accumulate", count), dataclasses.replace(request, batch=rows, accumulates=True)

    def batches() -> Iterator[_Change]:
        assert phase.accumulate is not None
        for rows in _halves(request.batch):
            yield spelled("batch", rows * phase.accumulate), dataclasses.replace(request, batch=rows)

    def more_devices() -> Iterator[_Change]:
        assert phase.batch is not None
        times = 2
        while times <= _MOST_TIMES:
            spec = dataclasses.replace(request.mesh, fsdp=request.mesh.fsdp * times)
            place = dataclasses.replace(request.topology, shape=(spec.devices,))
            larger = dataclasses.replace(request, topology=place, mesh=spec)
            text = f"{spec.devices} devices and --mesh {spec}"
            yield text, larger
            more = dataclasses.replace(larger, batch=request.batch * times)
            yield f"{text} {spelled('batch', phase.batch * times)}", more
            times *= 2

    changes = _remats(request), _moments(run, request), parts(), batches(), _meshes(request), more_devices()
    return [text for change in changes for text in [_first_that_fits(change)] if text]


def _first_that_fits(changes: Iterator[_Change]) -> str | None:
    for text, request in changes:
        try:
            if _need(checked(request)) <= request.topology.chip.memory:
                return text
        except ValueError:  # it does not divide
            continue
    return None


def _remats(request: Request) -> Iterator[_Change]:
    for remat in REMATS[REMATS.index(request.remat) + 1 :]:
        yield f"--remat {remat}", dataclasses.replace(request, remat=remat)


def _moments(run: Run, request: Request) -> Iterator[_Change]:
    first, second = request.state_bytes
    if first > 2:
        yield "--moments-dtype bfloat16", dataclasses.replace(request, moments=(2, second))
    if second > 2 and run.optimization.beta2 <= 0.998:  # above, it would no longer fall
        flags = "--second-moments-dtype bfloat16"
        text = f"--moments-dtype bfloat16 {flags}" if first > 2 else flags
        yield text, dataclasses.replace(request, moments=(2, 2))


def _halves(rows: int) -> Iterator[int]:
    while rows := rows // 2:
        yield rows


def _meshes(request: Request) -> Iterator[_Change]:
    """Of the same devices; first those that send least, weights before tokens before activations."""
    for spec in sorted(all_meshes(request), key=lambda spec: (spec.tensor, spec.context, spec.expert, -spec.fsdp)):
        if spec != request.mesh:
            yield f"--mesh {spec}", dataclasses.replace(request, mesh=spec)
