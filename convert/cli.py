"""`qwen2-jax convert`: bring checkpoints from and to Hugging Face, compare them, make experts of a dense model."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg, subcommand

from convert.checkpoint import open_checkpoint
from convert.conversion import Report, convert_from_hf, convert_to_hf
from convert.files import listing, shown
from convert.upcycle import Recipe, upcycle
from convert.verify import Comparison, Difference, compare, logits_difference
from qwen2_jax.command import exit_code, parse
from qwen2_jax.progress import byte_progress

_SHOWN = 8  # differing arrays that are listed

Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    arg(metavar="{bfloat16,float16,float32}", help_behavior_hint="(default: as stored)"),
]
ToHfDtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    arg(
        metavar="{bfloat16,float16,float32}",
        help_behavior_hint="(default: as stored; of a training step, what its config.json says: the run's --dtype)",
    ),
]
Size = Annotated[str, arg(metavar="SIZE")]


@dataclasses.dataclass(frozen=True)
class FromHf:
    """Convert a Hugging Face model to a checkpoint folder of ours.

    Every tensor is checked against config.json. Memory stays within --max-host-memory whatever the model's size. If the
    command is interrupted, the same command finishes the rest; DST appears only when it is complete.
    """

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Folder with config.json and safetensors files, or a hub id such as Qwen/Qwen2-0.5B (downloaded)."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """Folder to create."""
    dtype: Dtype = None
    """Number format of the weights written."""
    max_host_memory: Size = "2GiB"
    """Memory that this process may take up, such as 512MB."""
    overwrite: bool = False
    """Replace a checkpoint at DST, once the new one is complete."""
    allow_pickle: bool = False
    """Read PyTorch .bin files if there are no safetensors. Only for files whose author you trust."""
    json: bool = False
    """Report as one JSON object on standard output."""


@dataclasses.dataclass(frozen=True)
class ToHf:
    """Convert a checkpoint folder of ours to a Hugging Face folder: the files that transformers itself would write.

    Memory, interruption and DST are as for from-hf. Every number read is checked against its digest. Of a training step
    the parameters are taken, by default in the number format that its config.json names.
    """

    src: Annotated[Positional[Path], arg(metavar="SRC")]
    """Checkpoint folder of ours, or a step of a training run such as RUN/checkpoints/00001000."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """Folder to create."""
    dtype: ToHfDtype = None
    """Number format of the weights written."""
    shard_size: Size = "5GB"
    """Weights per file at most; what fits into one file becomes model.safetensors."""
    fused_experts: bool = False
    """Write a layer's experts as one tensor, as transformers 5 holds them, instead of one per expert as on the hub."""
    max_host_memory: Size = "2GiB"
    """Memory that this process may take up, such as 512MB."""
    overwrite: bool = False
    """Replace a checkpoint at DST, once the new one is complete."""
    json: bool = False
    """Report as one JSON object on standard output."""


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Make a mixture of experts of a dense model, as Qwen2-57B-A14B was made of Qwen2-7B: a checkpoint folder of ours.

    Copies of each layer's feed-forward network, their units in random order, are laid end to end and cut into experts,
    and a part of every expert is drawn anew. All else stays, bit for bit. Memory, interruption and DST are as for
    from-hf; the same seed makes the same files. docs/upcycling.md says what the result computes.
    """

    src: Annotated[Positional[str], arg(metavar="DENSE")]
    """The dense model: a folder, Hugging Face's or ours, or a hub id such as Qwen/Qwen2-7B (downloaded)."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """Folder to create."""
    recipe: Annotated[Recipe, arg(name="")]
    dtype: Dtype = None
    """Number format of the weights written."""
    max_host_memory: Size = "2GiB"
    """Memory that this process may take up, such as 512MB; one matrix of a dense layer must fit."""
    overwrite: bool = False
    """Replace a checkpoint at DST, once the new one is complete."""
    allow_pickle: bool = False
    """Read PyTorch .bin files if there are no safetensors. Only for files whose author you trust."""
    json: bool = False
    """Report as one JSON object on standard output."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare two checkpoints of either kind, tensor by tensor. Exit status 2 if they differ."""

    a: Annotated[Positional[str], arg(metavar="A")]
    """One checkpoint folder or hub id."""
    b: Annotated[Positional[str], arg(metavar="B")]
    """The other."""
    tolerance: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: equal bits)")] = None
    """Largest difference that counts as equal; without it, numbers of the wider format must round to the narrower's."""
    logits: bool = False
    """Also run both models in float32 on a fixed prompt, and compare the logits."""
    allow_pickle: bool = False
    """Read PyTorch .bin files if there are no safetensors. Only for files whose author you trust."""
    json: bool = False
    """Report as one JSON object on standard output."""


Job = (
    Annotated[FromHf, subcommand("from-hf")]
    | Annotated[ToHf, subcommand("to-hf")]
    | Annotated[Upcycle, subcommand("upcycle")]
    | Annotated[Verify, subcommand("verify")]
)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    job: Any = parse(Job, argv or ["--help"], prog="qwen2-jax convert")
    if isinstance(job, Verify):
        return _verify(job)
    what = "upcycling" if isinstance(job, Upcycle) else "converting"
    with byte_progress(what, quiet=job.json) as progress:
        shared = {
            "dtype": job.dtype,
            "max_host_memory": job.max_host_memory,
            "overwrite": job.overwrite,
            "progress": progress,
        }
        if isinstance(job, FromHf):
            report = convert_from_hf(job.src, job.dst, allow_pickle=job.allow_pickle, **shared)
        elif isinstance(job, Upcycle):
            report = upcycle(job.src, job.dst, job.recipe, allow_pickle=job.allow_pickle, **shared)
        else:
            report = convert_to_hf(
                job.src, job.dst, shard_size=job.shard_size, fused_experts=job.fused_experts, **shared
            )
    for warning in report.warnings:
        print(f"qwen2-jax: warning: {warning}", file=sys.stderr)
    print(_json(dataclasses.asdict(report)) if job.json else _sentence(report))
    if report.rounded and not job.json:
        unasked = " (--dtype float32 keeps them as they are)" if job.dtype is None else ""
        print(f"weights are rounded from {report.rounded}{unasked}")
    return 0


def _sentence(report: Report) -> str:
    where = shown(report.destination)
    if report.already_complete:
        return f"{where} is complete already; nothing to do (--overwrite makes it anew)"
    resumed = f", {report.bytes_resumed / 1e9:.2f} GB of it from an earlier run" if report.bytes_resumed else ""
    return (
        f"{where}: {report.parameters:,} parameters in {report.arrays} arrays, "
        f"{report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s{resumed}"
    )


def _verify(job: Verify) -> int:
    a, b = open_checkpoint(job.a, job.allow_pickle), open_checkpoint(job.b, job.allow_pickle)
    names = f"{shown(job.a)} and {shown(job.b)}"
    with byte_progress("comparing", quiet=job.json) as progress:
        result = compare(a, b, job.tolerance, progress)
    logits = None
    if job.logits and not result.config:
        logits = logits_difference(a, b)
    # Across number formats logits differ by rounding: then only a tolerance that was given can judge them.
    limit = 0.0 if job.tolerance is None and a.dtypes == b.dtypes else job.tolerance
    apart = None if logits is None else logits["max_abs_diff"]
    far = apart is not None and limit is not None and not apart <= limit
    if job.json:
        print(_json({"equal": result.equal and not far, **dataclasses.asdict(result), "logits": logits}))
    else:
        for difference in result.differences[:_SHOWN]:
            print(_difference(difference))
        if len(result.differences) > _SHOWN:
            print(f"... and {len(result.differences) - _SHOWN} more arrays that differ")
        if job.logits and logits is None:
            print("logits were not compared: the configurations differ")
        elif logits is not None:
            agree = "the same" if logits["same_tokens"] else "not the same"
            print(
                f"logits of {logits['prompt_tokens']} tokens: largest difference {logits['max_abs_diff']:.3g}, {agree} "
                "most likely tokens"
            )
    if not result.equal:
        raise ValueError(f"{names} differ: {_summary(result)}")
    if far:
        raise ValueError(f"the logits of {names} differ by up to {apart:.3g}")
    if not job.json:
        how = f" after rounding to {' and '.join(result.rounded_to)}" if result.rounded_to else ""
        how = how if job.tolerance is None else f" within {job.tolerance:g}"
        print(f"equal{how}: {result.compared} arrays, {result.numbers:,} parameters")
    return 0


def _json(value: Any) -> str:
    """JSON as the standard has it, which knows no NaN and no infinity: null stands for them."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def _summary(result: Comparison) -> str:
    # Which arrays there are, and their shapes, follow from config.json: both checkpoints were found to fit theirs.
    parts = [listing({"fields of config.json": list(result.config)})] if result.config else []
    if result.differences:
        parts.append(
            f"{len(result.differences)} of {result.compared} arrays, first {_difference(result.differences[0])}"
        )
    return "; ".join(parts)


def _difference(difference: Difference) -> str:
    a, b = difference.values
    return (
        f"{difference.tensor}{list(difference.index)} is {a:g} and {b:g} ({difference.count} numbers of "
        f"{difference.array} differ, by up to {difference.max_abs_diff:.3g})"
    )
