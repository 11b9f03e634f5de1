"""What a training run is: the options of its command line, and of run files (`train.run_file`)."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tyro.conf import Positional, Suppress, arg

from sharding.planner.request import Remat
from train.data.readers import MAX_BAD_RECORDS

Dtype = Literal["float32", "bfloat16"]

_MOST = np.iinfo(np.int32).max
_TINY, _LARGE = (float(bound) for bound in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def _check(**limits: tuple[float | None, int]) -> None:
    """Refuses options, given with the least that they may be."""
    for name, (value, least) in limits.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
        if value is not None and value > _MOST:  # steps, rows and seeds are int32 in the compiled programs
            raise ValueError(f"--{name.replace('_', '-')} must be below 2**31, got {value}")


def _check_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0, got {value}")
        if value is not None and not _TINY <= value <= _LARGE:
            raise ValueError(f"--{name.replace('_', '-')} must fit into float32, got {value}")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run with its own lengths, batches, data or rope base; what is None is as in the run."""

    steps: int
    seq: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    rope_theta: float | None = None
    data: tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        _check(steps=(self.steps, 1), seq=(self.seq, 2), batch=(self.batch, 1), accumulate=(self.accumulate, 1))
        _check_positive(rope_theta=self.rope_theta)


@dataclasses.dataclass(frozen=True)
class Start:
    """The model, and the weights to start from."""

    model: Annotated[str | None, arg(metavar="NAME|FOLDER", help_behavior_hint="(default: that of --init)")] = None
    """Published model, as qwen2-0.5b, or a folder with a config.json; its weights are drawn at random."""
    init: Annotated[str | None, arg(metavar="NAME|FOLDER", help_behavior_hint="(default: none)")] = None
    """Checkpoint whose weights to start from: a hub id, or a folder, also a step of a run; instead of --model."""
    tokenizer: Annotated[
        str | None, arg(metavar="NAME|FOLDER", help_behavior_hint="(default: in the folder of --init or --model)")
    ] = None
    """Folder with the tokenizer's files, or a hub id, as Qwen/Qwen2-0.5B; every checkpoint gets a copy."""


@dataclasses.dataclass(frozen=True)
class Text:
    """The text, and how much of it a step takes."""

    data: Annotated[tuple[str, ...], arg(metavar="PATH...", help_behavior_hint="(required)")] = ()
    """Folders that `train tokenize` made, or text: files, folders, globs of jsonl, parquet, Arrow, ArrayRecord, txt."""
    weights: Annotated[tuple[float, ...], arg(metavar="X...", help_behavior_hint="(default: by size)")] = ()
    """Share of the tokens that each of --data gets."""
    field: Annotated[str, arg(metavar="NAME")] = "text"
    """Name of the text in records."""
    cache: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: RUN/tokens)")] = None
    """Where text is kept once it is tokenized."""
    max_bad_records: Annotated[int, arg(metavar="N")] = MAX_BAD_RECORDS
    """Damaged records to pass over, counted and named, before giving up."""
    no_verify_data: bool = False
    """Start without reading all tokens once, to compare them with the digests that were written with them."""
    seq: Annotated[int, arg(metavar="N")] = 4096
    """Tokens of a row."""
    batch: Annotated[int, arg(metavar="N")] = 8
    """Rows of a step, all devices together."""
    accumulate: Annotated[int, arg(metavar="N")] = 1
    """Parts in which a step goes through its rows, to save memory; the gradient is the same."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of the order of documents, and of random weights."""

    def __post_init__(self):
        _check(seq=(self.seq, 2), batch=(self.batch, 1), accumulate=(self.accumulate, 1), seed=(self.seed, 0))
        _check(max_bad_records=(self.max_bad_records, 0))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Text that is not trained on, to see what the model makes of it."""

    validation_data: Annotated[tuple[str, ...], arg(metavar="PATH...", help_behavior_hint="(default: none)")] = ()
    """Text as that of --data, several by size."""
    validate_every: Annotated[int, arg(metavar="N")] = 500
    """Steps between measurements of the loss on it; the last step of a phase always has one."""
    validation_rows: Annotated[int, arg(metavar="N")] = 64
    """Rows of it to measure the loss on, the same ones every time; a batch is always whole."""

    def __post_init__(self):
        _check(validate_every=(self.validate_every, 1), validation_rows=(self.validation_rows, 1))


@dataclasses.dataclass(frozen=True)
class Optimization:
    """AdamW after clipping; norms and biases do not decay."""

    steps: Annotated[int, arg(metavar="N")] = 1000
    """Steps of the whole run, unless the run file lists phases."""
    learning_rate: Annotated[float, arg(metavar="X")] = 3e-4
    """Highest rate, after the warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """What follows the warm-up: a cosine to --final-rate, a plateau with a decay at its end (wsd), or nothing."""
    warmup: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: a tenth of all steps, at most 100)")
    ] = None
    """Steps over which the rate rises from zero."""
    decay: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a tenth of all steps)")] = None
    """Last steps over which wsd brings the rate down."""
    final_rate: Annotated[float, arg(metavar="X")] = 0.1
    """What the rate ends at, as a share of --learning-rate."""
    beta1: Annotated[float, arg(metavar="X")] = 0.9
    """How much of the mean of gradients a step keeps."""
    beta2: Annotated[float, arg(metavar="X")] = 0.95
    """How much of the mean of squared gradients a step keeps."""
    epsilon: Annotated[float, arg(metavar="X")] = 1e-8
    """Added to the root of that mean, which updates are divided by."""
    weight_decay: Annotated[float, arg(metavar="X")] = 0.1
    """Share of a weight that an update takes off, before it is multiplied by the rate."""
    clip_norm: Annotated[float, arg(metavar="X")] = 1.0
    """Longest gradient, over all parameters; 0 does not clip."""
    z_loss: Annotated[float, arg(metavar="X")] = 0.0
    """Weight of the squared log-partition in the loss."""
    params_dtype: Dtype = "float32"
    """Of the master weights."""
    moments_dtype: Dtype = "float32"
    """Of AdamW's first moment."""
    second_moments_dtype: Dtype = "float32"
    """Of AdamW's second moment; in bfloat16 it no longer falls where beta2 is above 0.998."""

    def __post_init__(self):
        _check(steps=(self.steps, 1), warmup=(self.warmup, 0), decay=(self.decay, 1))
        _check(weight_decay=(self.weight_decay, 0), clip_norm=(self.clip_norm, 0), z_loss=(self.z_loss, 0))
        _check_positive(learning_rate=self.learning_rate, epsilon=self.epsilon)
        for name, value in (("final-rate", self.final_rate), ("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value <= 1 or (name != "final-rate" and value == 1):
                raise ValueError(f"--{name} is a share, from 0 to 1, got {value}")
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"--decay is for --schedule wsd, got --schedule {self.schedule}")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How, as opposed to what: none of these changes the result, but for rounding."""

    mesh: Annotated[str, arg(metavar="AXIS=N,...")] = "fsdp=-1"
    """How devices are used: data, fsdp, expert, context, tensor; -1 for one of them takes what is left."""
    dtype: Dtype = "bfloat16"
    """Of activations, and of weights in products."""
    remat: Remat = "full"
    """What is kept of each layer for the backward pass; the rest is computed again."""
    attention: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: by platform)")] = None
    """Implementation of attention."""
    moe: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: by platform)")] = None
    """Backend of expert layers."""
    capacity_factor: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: nothing is dropped)")] = (
        None
    )
    """Room of an expert, as a multiple of its even share; choices beyond it are dropped, and counted."""
    no_plan: bool = False
    """Start even if the planner's formula says that the run does not fit the devices' memory."""
    compilation_cache: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """Where compiled programs are kept between runs; not with several CPU devices, whose cached programs deadlock."""
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint="(default: as JAX finds it)")] = None
    """Address of process 0, where JAX does not find the cluster by itself; with --processes and --process."""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as JAX finds it)")] = None
    """How many processes the run has."""
    process: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as JAX finds it)")] = None
    """Which of them this one is, from 0."""

    def __post_init__(self):
        _check_positive(capacity_factor=self.capacity_factor)


@dataclasses.dataclass(frozen=True)
class Safety:
    """Checkpoints, and what happens when a step goes wrong."""

    resume: Annotated[str, arg(metavar="auto|never|STEP")] = "auto"
    """Go on from the newest checkpoint if there is one, refuse to, or go on from STEP (newer ones are put aside)."""
    save_every: Annotated[int, arg(metavar="N")] = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, arg(metavar="N")] = 3
    """Newest checkpoints to keep."""
    keep_every: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: none)")] = None
    """Also keep those of steps that this divides; a multiple of --save-every."""
    wait_for_saves: bool = False
    """Go on only once a checkpoint is whole: a kill then costs --save-every steps at most."""
    max_skips: Annotated[int, arg(metavar="N")] = 10
    """Steps in a row that the guard may skip, before the run goes back to a checkpoint and passes over their data."""
    max_rollbacks: Annotated[int, arg(metavar="N")] = 3
    """How often the run may go back, before it gives up."""
    spikes: Annotated[float | None, arg(metavar="SIGMAS", help_behavior_hint="(default: not looked for)")] = None
    """Also skip steps whose loss or gradient lies that many standard deviations above those before."""

    def __post_init__(self):
        _check(save_every=(self.save_every, 1), keep_last=(self.keep_last, 1), keep_every=(self.keep_every, 1))
        if self.keep_every is not None and self.keep_every % self.save_every:
            multiple = -(-self.keep_every // self.save_every) * self.save_every
            raise ValueError(
                f"--keep-every {self.keep_every} is no multiple of --save-every {self.save_every}, so that not all of "
                f"those steps are saved; change either, as to --keep-every {multiple}"
            )
        _check(max_skips=(self.max_skips, 1), max_rollbacks=(self.max_rollbacks, 0))
        _check_positive(spikes=self.spikes)
        if self.resume not in ("auto", "never") and not self.resume.isdecimal():
            raise ValueError(f"--resume is auto, never, or the number of a step, got {self.resume!r}")


@dataclasses.dataclass(frozen=True)
class Output:
    """What one sees."""

    log_every: Annotated[int, arg(metavar="N")] = 10
    """Steps between lines, and between records of metrics.jsonl."""
    json: bool = False
    """Print what metrics.jsonl gets, an object on a line, instead of lines for people."""
    tensorboard: bool = False
    """Also write for TensorBoard (pip install 'qwen2-jax[tensorboard]')."""
    wandb: Annotated[str | None, arg(metavar="PROJECT", help_behavior_hint="(default: none)")] = None
    """Also report to Weights & Biases (pip install 'qwen2-jax[wandb]')."""
    profile: Annotated[tuple[int, int] | None, arg(metavar="FIRST LAST", help_behavior_hint="(default: none)")] = None
    """Steps to trace for XProf, into RUN/profile."""

    def __post_init__(self):
        _check(log_every=(self.log_every, 1))
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            first, last = self.profile
            raise ValueError(f"--profile is the first step to trace, from 1, and the last one, got {first} {last}")


@dataclasses.dataclass(frozen=True)
class Run:
    """Train on text: next-token prediction over packed documents, from scratch or from a checkpoint.

    Options can come from a run file, YAML with the same names (`learning_rate: 3e-4`), or from a preset; flags beside
    it prevail. The same command goes on where the run was stopped, by whatever: a kill costs the steps since the last
    checkpoint, SIGTERM and Ctrl-C none (they save, and exit with 75). docs/training.md has the details.
    """

    file: Annotated[Positional[str | None], arg(metavar="[FILE|PRESET]", help_behavior_hint="(default: none)")] = None
    """Run file, or name of a preset (docs/training.md lists them); ahead of all options."""
    out: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="(required)")] = None
    """Folder of the run: options, metrics and checkpoints."""
    start: Start = Start()
    text: Text = Text()
    held_out: HeldOut = HeldOut()
    optimization: Optimization = Optimization()
    compute: Compute = Compute()
    safety: Safety = Safety()
    output: Output = Output()
    phases: Annotated[tuple[Phase, ...], Suppress] = ()

    @property
    def stretches(self) -> tuple[Phase, ...]:
        """The phases, one at least, with nothing left to the run but the rope base."""
        text = self.text
        return tuple(
            dataclasses.replace(
                phase,
                seq=phase.seq or text.seq,
                batch=phase.batch or text.batch,
                accumulate=phase.accumulate or text.accumulate,
                data=phase.data or text.data,
                weights=phase.weights or (() if phase.data else text.weights),
            )
            for phase in self.phases or (Phase(self.optimization.steps),)
        )

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.stretches)

    @property
    def warm_up(self) -> int:
        """Steps of it."""
        given = self.optimization.warmup
        return min(100, self.steps // 10) if given is None else given
