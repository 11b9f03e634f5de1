"""A run from its options to its end, whatever the objective."""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from convert.checkpoint import open_checkpoint
from convert.chunks import Source
from convert.files import expanded, shown, write_whole
from convert.folder import carried_files, check_vocabulary, config_bytes, local_folder, splitting_warnings
from convert.load import load_open
from qwen2_jax.config import Qwen2Config
from qwen2_jax.json_object import read_json_object
from qwen2_jax.model import abstract_params
from qwen2_jax.tokenizer import Tokenizer, tokenizer_file
from sharding.mesh import MeshSpec, make_mesh
from sharding.planner.request import read_config
from sharding.run import run_options
from train.checkpoints import Checkpoints
from train.data.batches import Batches, Rows
from train.data.encode import end_id
from train.guard import Guard
from train.loop import Limits, Loop, Stage
from train.objective import Objective, Step
from train.optimizer import adamw
from train.preflight import check_run
from train.report.profile import Profile
from train.report.reporter import Reporter
from train.report.throughput import work
from train.run import Phase, Run
from train.run_folder import CHECKPOINTS, MODEL, locked, note_start, read_windows
from train.schedule import LearningRate
from train.step import TrainState, abstract_state, init_state, make_train_step, new_state, state_shardings
from train.stopping import watch_for_stop
from train.validation import Validation

RowsOf = Callable[[int, Phase], Rows]
"""The rows of a phase, by its number from 0."""

ValidationRowsOf = Callable[[Phase], Rows]
"""The rows that a phase is validated on."""


def train(run: Run, objective: Objective, rows_of: RowsOf, validation_rows_of: ValidationRowsOf | None = None) -> int:
    """Trains, from the newest checkpoint in the run's folder or from the beginning.

    Args:
      run: its options.
      objective: what to make smaller.
      rows_of: the data; asked for every phase, in order.
      validation_rows_of: what to measure the loss on as well, without training on it.

    Returns:
      The exit status: 0 when the last step is saved and was read back, `train.stopping.STOPPED` when the run was asked
      to stop, and saved.

    Raises:
      ValueError, OSError: for options, files or data that do not serve, before anything is compiled; and for what goes
        wrong on the way, as `Loop.run`.
    """
    if run.out is None:
        raise ValueError("--out is missing: name the folder of the run")
    _keep_programs(run)
    config, weights = _model(run)
    _check_heeded(run, config)
    tokenizer = tokenizer_of(run)
    check_vocabulary(tokenizer, config)
    for warning in splitting_warnings(tokenizer) if jax.process_index() == 0 else ():
        print(f"qwen2-jax: warning: {warning}", file=sys.stderr)
    config = _with_end(config, tokenizer)
    spec = MeshSpec.parse(run.compute.mesh).resolve(jax.device_count())
    phases = run.stretches
    configs = [_config_of(config, phase) for phase in phases]
    check_run(run, configs, spec, jax.devices())
    optimizer = _optimizer(run)
    mesh = make_mesh(spec)
    abstract = abstract_state(configs[0], optimizer, mesh, jnp.dtype(run.optimization.params_dtype))
    with contextlib.ExitStack() as open_until_done:
        enter = open_until_done.enter_context
        enter(locked(run.out))
        models = [_write_model(run, of_phase, tokenizer, number) for number, of_phase in enumerate(configs)]
        safety, output = run.safety, run.output
        checkpoints = Checkpoints(
            run.out / CHECKPOINTS, models[0], safety.keep_last, safety.keep_every, safety.wait_for_saves
        )
        enter(contextlib.closing(checkpoints))
        resumed = _resumed(run, checkpoints)
        if resumed is not None and resumed >= run.steps:
            return _already_there(run, checkpoints, resumed)
        stages = _stages(run, configs, rows_of, validation_rows_of, models, optimizer, objective, mesh)
        windows = read_windows(run.out)
        if resumed is None:
            state = _first_state(run, configs[0], weights, optimizer, mesh)
        else:
            state, _ = checkpoints.restore(resumed, abstract)
        texts = [stage.batches.digest for stage in stages]
        begun = sum(stage.first < (resumed or 0) for stage in stages)
        other = [] if resumed is None else _config_changes(checkpoints, resumed, models[max(begun - 1, 0)])
        changes = note_start(run, run.out, resumed or 0, texts, begun, other)
        stop = enter(watch_for_stop())
        reporter = enter(
            Reporter(
                run.out,
                run.steps,
                first_step=resumed or 0,
                tensorboard=output.tensorboard,
                wandb=output.wandb,
                json=output.json,
            )
        )
        profile = None if output.profile is None else enter(Profile(run.out / "profile", *output.profile))
        reporter.start(_facts(run, configs[0], spec, stages, resumed))
        if changes:
            reporter.event("options", step=resumed or 0, changed="; ".join(changes))
        limits = Limits(
            save_every=safety.save_every,
            log_every=output.log_every,
            validate_every=run.held_out.validate_every,
            max_skips=safety.max_skips,
            max_rollbacks=safety.max_rollbacks,
        )
        loop = Loop(
            run.out,
            stages,
            state,
            abstract,
            limits=limits,
            windows=windows,
            checkpoints=checkpoints,
            reporter=reporter,
            profile=profile,
            stop=stop,
        )
        del state  # the loop uses it up
        return loop.run()


def tokenizer_of(run: Run) -> Path:
    """The folder with the run's tokenizer.

    Raises:
      ValueError: if none was named, it cannot be downloaded, or the folder holds none.
    """
    name = run.start.tokenizer or run.start.init
    if name is None and run.start.model is not None and tokenizer_file(expanded(run.start.model)) is not None:
        name = run.start.model
    if name is None:
        raise ValueError("--tokenizer is missing: name a folder with tokenizer.json, or a hub id, as Qwen/Qwen2-0.5B")
    folder = local_folder(name, weights="none")
    if tokenizer_file(folder) is None:
        raise ValueError(
            f"{shown(folder)} holds no tokenizer; --tokenizer names a folder with tokenizer.json, or a hub id, as "
            "Qwen/Qwen2-0.5B"
        )
    return folder


def _keep_programs(run: Run) -> None:
    """Lets JAX keep compiled programs where the run wants it."""
    if run.compute.compilation_cache is None:
        return
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # They come back without the order of their collectives (jax 0.10.1).
        raise ValueError("--compilation-cache does not work with several CPU devices: cached programs deadlock there")
    jax.config.update("jax_compilation_cache_dir", str(run.compute.compilation_cache))


def _model(run: Run) -> tuple[Qwen2Config, Source | None]:
    """The model, and where its first weights are, unless they are drawn."""
    start = run.start
    if (start.model is None) == (start.init is None):
        raise ValueError(
            "name the model by --model (random weights) or by --init (those of a checkpoint), "
            f"{'not by both' if start.model else 'got neither'}"
        )
    if start.init is not None:
        source = open_checkpoint(start.init)
        return source.config, source
    assert start.model is not None
    return read_config(start.model), None


def _check_heeded(run: Run, config: Qwen2Config) -> None:
    """Raises ValueError for options that this run would pass over."""
    if run.output.profile is not None and (first := run.output.profile[0]) > run.steps:
        raise ValueError(f"--profile begins with step {first}, and the run has {run.steps}; give steps of it")
    if not config.is_moe and (run.compute.moe or run.compute.capacity_factor):
        raise ValueError("--moe and --capacity-factor are for a mixture of experts, and this model is dense")


def _with_end(config: Qwen2Config, tokenizer: Path) -> Qwen2Config:
    """The model's config.json with the token that ends a document in it, unless it names one.

    transformers generates without an end where neither it nor generation_config.json does.
    """
    hf = config.to_hf()
    if hf.get("eos_token_id") is not None:
        return config
    try:
        end = end_id(Tokenizer.from_folder(tokenizer), None)
    except ValueError:  # the data's own error, should it need one
        return config
    return Qwen2Config.from_hf({**hf, "eos_token_id": end})


def _config_of(config: Qwen2Config, phase: Phase) -> Qwen2Config:
    return config if phase.rope_theta is None else dataclasses.replace(config, rope_theta=phase.rope_theta)


def _optimizer(run: Run) -> optax.GradientTransformation:
    how = run.optimization
    decay = 0
    if how.schedule == "wsd":
        decay = max(1, run.steps // 10) if how.decay is None else how.decay
    if run.warm_up + decay > run.steps:
        ends = f" and a decay of {decay} at its end" if decay else ""
        most = max(run.steps - decay, 0)
        fitting = f"--warmup {most}" + " or less" * (most > 0) + ", or a shorter --decay" * (decay > 0)
        raise ValueError(
            f"a warm-up of {run.warm_up} steps{ends} does not fit into a run of {run.steps} steps; give {fitting}"
        )
    rate = LearningRate(how.learning_rate, how.schedule, run.warm_up, decay, how.final_rate).over(run.steps)
    return adamw(
        rate,
        b1=how.beta1,
        b2=how.beta2,
        eps=how.epsilon,
        weight_decay=how.weight_decay,
        clip_norm=how.clip_norm or None,
        moments_dtype=jnp.dtype(how.moments_dtype),
        second_moments_dtype=jnp.dtype(how.second_moments_dtype),
    )


def _stages(
    run: Run,
    configs: Sequence[Qwen2Config],
    rows_of: RowsOf,
    validation_rows_of: ValidationRowsOf | None,
    models: Sequence[Path],
    optimizer: optax.GradientTransformation,
    objective: Objective,
    mesh: Mesh,
) -> list[Stage]:
    how, stages, first = run.compute, [], 0
    for number, (config, phase, model) in enumerate(zip(configs, run.stretches, models, strict=True)):
        assert phase.batch is not None and phase.seq is not None and phase.accumulate is not None
        options = run_options(config, mesh, attention=how.attention, moe=how.moe, capacity_factor=how.capacity_factor)
        computed = Step(jnp.dtype(how.dtype), how.remat, options, mesh=mesh, accumulate=phase.accumulate)
        step = make_train_step(config, optimizer, computed, objective, Guard(run.safety.spikes))
        count = phase.batch // phase.accumulate
        shape = (count,) if phase.accumulate == 1 else (phase.accumulate, count)
        batches = Batches(rows_of(number, phase), shape, mesh)
        cost = work(config, phase.seq, jax.devices())
        validation = None
        if validation_rows_of is not None:
            held_out = Batches(validation_rows_of(phase), (count,), mesh)
            enough = -(-run.held_out.validation_rows // count)
            validation = Validation(config, objective, computed._replace(accumulate=1), held_out, enough)
        tokens = phase.batch * phase.seq
        stages.append(Stage(first, first + phase.steps, step, batches, tokens, cost, model, validation))
        first += phase.steps
    return stages


def _first_state(
    run: Run, config: Qwen2Config, weights: Source | None, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    dtype = jnp.dtype(run.optimization.params_dtype)
    if weights is None:
        return init_state(config, optimizer, jax.random.key(run.text.seed), mesh, dtype)
    _, params = load_open(weights, dtype, mesh, stacked=True)
    shardings = state_shardings(config, optimizer, mesh)
    return jax.jit(functools.partial(new_state, optimizer), out_shardings=shardings, donate_argnums=0)(params)


def _write_model(run: Run, config: Qwen2Config, tokenizer: Path, phase: int) -> Path:
    """A folder with what a checkpoint of this phase says of its model."""
    assert run.out is not None
    folder = run.out / MODEL / f"phase-{phase + 1}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", config_bytes(config, np.dtype(run.compute.dtype)))
        for file in carried_files(tokenizer):
            write_whole(folder / file.name, file.read_bytes())
    multihost_utils.sync_global_devices(f"model of phase {phase}")
    return folder


def _config_changes(checkpoints: Checkpoints, step: int, model: Path) -> list[str]:
    """What the model's config.json says otherwise than that of a step, whose arrays may fit it all the same."""
    before, now = (read_json_object(folder / "config.json") for folder in (checkpoints.place(step), model))
    return [
        f"{name} in config.json: {before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in ("dtype", "torch_dtype") and before.get(name) != value
    ]


def _resumed(run: Run, checkpoints: Checkpoints) -> int | None:
    """The step to go on from; None begins anew."""
    steps, wanted = _steps(checkpoints), run.safety.resume
    if wanted == "auto":
        return steps[-1] if steps else None
    if wanted == "never":
        if steps:
            raise ValueError(
                f"{run.out} holds step {steps[-1]} of a run already; choose another --out, or --resume auto"
            )
        return None
    if int(wanted) not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{run.out} has no checkpoint of step {wanted} to resume from; there are: {there}")
    return int(wanted)


def _steps(checkpoints: Checkpoints) -> list[int]:
    """As the first process finds them, in every process: a disk over a network may not show the same to all at once."""
    steps = checkpoints.steps()
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    found = np.resize(np.array([*steps, 0], np.int32), count + 1)  # what other processes hold does not matter
    return multihost_utils.broadcast_one_to_all(found).tolist()[:-1]


def _already_there(run: Run, checkpoints: Checkpoints, step: int) -> int:
    if step > run.steps:
        raise ValueError(
            f"{run.out} is at step {step} already, and asked for are {run.steps} in all; ask for more, or go back by "
            "--resume STEP"
        )
    checkpoints.verify(step)
    if jax.process_index() == 0 and run.output.json:
        print(json.dumps({"event": "finished", "step": step}), flush=True)
    elif jax.process_index() == 0:
        print(f"{run.out} is complete: step {step} of {step} is saved, and was read back", flush=True)
    return 0


def _facts(
    run: Run, config: Qwen2Config, spec: MeshSpec, stages: Sequence[Stage], resumed: int | None
) -> dict[str, str]:
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(config)))
    devices = jax.devices()
    processes = "1 process" if jax.process_count() == 1 else f"{jax.process_count()} processes"
    phases = "; then ".join(
        f"{phase.steps:,} steps of {phase.batch} x {phase.seq:,} tokens"
        + ("" if phase.rope_theta is None else f", rope base {phase.rope_theta:g}")
        for phase in run.stretches
    )
    return {
        "run": str(run.out),
        "model": f"{run.start.model or run.start.init}, {count / 1e6:,.1f} M parameters",
        "devices": f"{len(devices)} x {devices[0].device_kind}, {processes}, mesh {spec}",
        "phases": phases,
        "data": "; then ".join(stage.batches.described(stage.last - stage.first) for stage in stages),
        "from": "the beginning" if resumed is None else f"step {resumed:,}",
    }
