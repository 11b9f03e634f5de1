"""`qwen2-jax evaluate bench`: how fast a model runs here, beside what this machine can do at most."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen2_jax.commands.evaluation import aligned, versions
from qwen2_jax.commands.harness import XlaFlags, set_flags
from qwen2_jax.commands.session import Attention, Mesh, attention_option, options_over, split_over
from qwen2_jax.config import Qwen2Config

if TYPE_CHECKING:  # only: flags are set before JAX starts
    from qwen2_jax.evaluation.bench import Bench, Ceilings
    from qwen2_jax.evaluation.memory import Needs

NAME = "bench"

_COMPARED_BYTES = 4e9
"""Weights up to which a run on CPU compares with transformers by itself."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure prefill, decoding and log-likelihoods, beside the bandwidth and the matrix products of the same device.

    Nothing is downloaded and nothing is needed but a size: its random weights are made on the device. What the run
    takes is printed beside what is free before anything is allocated.
    """

    size: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """A published size, as qwen2-7b, with random weights. Or --model."""
    model: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Folder of a checkpoint, ours or Hugging Face's, or a hub id. Or --size."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: as stored; bfloat16 for --size)"),
    ] = None
    """Of weights and arithmetic."""
    mesh: Mesh = None
    """Spread the model over all devices, as in data=2,tensor=4 (also fsdp, expert, context); -1 takes what is left."""
    attention: Annotated[Attention | None, attention_option()] = None
    """How attention over a prompt is computed; cudnn needs an NVIDIA GPU, pallas is for TPUs."""
    batches: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1, 8, 32, 64)
    """Rows of the batches that are decoded."""
    prompt_length: int = 512
    """Tokens of each prompt before decoding."""
    new_tokens: int = 64
    """Tokens that are decoded after it."""
    prefill_length: int = 4096
    """Tokens of the prompt whose reading is measured."""
    questions: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 128, on CPU 16)")] = None
    """Of four choices each, whose log-likelihoods are measured."""
    repeats: int = 3
    """Measurements of each kind; medians are shown."""
    compare: Annotated[
        Literal["transformers", "none"] | None,
        tyro.conf.arg(metavar="{transformers,none}", help_behavior_hint="(default: transformers on CPU, if small)"),
    ] = None
    """Measure transformers with random weights of the same shape before, in a process of its own."""
    xla_flags: XlaFlags = "none"
    """What to set before JAX starts: what helps on the platform and this JAX knows (see qwen2_jax/xla_flags.py)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: only printed)")] = None
    """Where the report goes."""
    json: bool = False
    """Print the report as one JSON object, and nothing else."""


@dataclasses.dataclass(frozen=True)
class _Model:
    """What is measured, before there are weights."""

    name: str
    config: Qwen2Config
    dtype: Any
    weights: int
    """Bytes of a device's part."""
    parameters: int
    source: Any
    """An open checkpoint; None for random weights."""


def run(options: Options) -> int:
    _check(options)
    done, unknown = set_flags(options.xla_flags)
    if options.compare == "transformers":
        # Or JAX would keep the GPU's memory for itself while transformers is measured.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from qwen2_jax.evaluation import memory

    device = jax.devices()[0]
    mesh = None
    config, source = _config(options)
    _check_lengths(options, config)
    if options.mesh is not None:
        from sharding import make_mesh

        mesh = make_mesh(options.mesh)
    layer_options, split = options_over(config, mesh, options.attention), split_over(mesh)
    model = _model(options, config, source, mesh)
    free = memory.free_on_each([device] if mesh is None else list(mesh.local_devices))
    planned = _plan(options, model, layer_options, split, free, device.platform)
    theirs = _transformers(options, model, device.platform, free)
    report = {
        "benchmark": "evaluate bench",
        "model": model.name,
        "parameters": model.parameters,
        "dtype": model.dtype.name,
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "json")},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": 1 if mesh is None else mesh.size,
            "mesh": options.mesh,
        },
        "xla_flags": {
            **{name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
            "recommended": [str(setting) for setting in done],
            "not_known": [str(setting) for setting in unknown],
        },
        "versions": versions(),
        "memory": planned,
        **_measured(options, model, mesh, layer_options, split),
        "transformers": theirs,
    }
    report["options"]["out"] = None if options.out is None else str(options.out)
    _compare(report)
    if options.out is not None:
        from convert.files import write_whole

        write_whole(options.out, (json.dumps(report, indent=1, default=str) + "\n").encode())
    print(json.dumps(report, default=str) if options.json else _summary(report))
    return 0


def _check(options: Options) -> None:
    """
    Raises:
      ValueError: for options that contradict each other, before anything is read.
    """
    if (options.size is None) == (options.model is None):
        raise ValueError("give one of --size NAME, for random weights, and --model PATH")
    if not options.batches:
        raise ValueError("--batches names no batch")
    numbers = {
        "--batches": min(options.batches),
        "--prompt-length": options.prompt_length,
        "--new-tokens": options.new_tokens,
        "--prefill-length": options.prefill_length,
        "--repeats": options.repeats,
        "--questions": 1 if options.questions is None else options.questions,
    }
    for flag, number in numbers.items():
        if number < 1:
            raise ValueError(f"{flag} must be at least 1, got {number}")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.compare == "transformers" and (missing := _missing()):
        raise ValueError(f"--compare transformers needs {' and '.join(missing)}, which are not installed")


def _missing() -> list[str]:
    return [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


def _config(options: Options) -> tuple[Qwen2Config, Any]:
    """The configuration, and the open checkpoint if there is one."""
    if options.size is not None:
        from qwen2_jax.sizes import published

        return published(options.size), None
    from convert.checkpoint import open_checkpoint

    assert options.model is not None
    source = open_checkpoint(options.model)
    return source.config, source


def _check_lengths(options: Options, config: Qwen2Config) -> None:
    lengths = {
        "--prefill-length": options.prefill_length,
        "--prompt-length and --new-tokens together": options.prompt_length + 1 + options.new_tokens,
    }
    for flag, length in lengths.items():
        if config.max_length is not None and length > config.max_length:
            raise ValueError(f"{flag} need {length} positions, the model has {config.max_length}; lower them")


def _model(options: Options, config: Qwen2Config, source: Any, mesh: Any) -> _Model:
    import jax
    import jax.numpy as jnp

    from qwen2_jax.model import abstract_params

    stored = "bfloat16" if source is None else source.dtypes["embed.embedding"]
    dtype = jnp.dtype(options.dtype or stored)
    arrays = jax.tree.leaves(abstract_params(config))
    shapes = [array.shape for array in arrays]
    if mesh is not None:
        from sharding import param_shardings

        shardings = jax.tree.leaves(param_shardings(config, mesh))
        shapes = [sharding.shard_shape(shape) for sharding, shape in zip(shardings, shapes, strict=True)]
    return _Model(
        name=options.size or str(options.model),
        config=config,
        dtype=dtype,
        weights=sum(math.prod(shape) for shape in shapes) * dtype.itemsize,
        parameters=sum(array.size for array in arrays),
        source=source,
    )


def _plan(options: Options, model: _Model, layer_options: Any, split: Any, free: int, platform: str) -> dict[str, Any]:
    """Says what the run takes, and what is free on each device.

    Raises:
      ValueError: if it cannot fit.
    """
    from qwen2_jax.evaluation import bench
    from qwen2_jax.evaluation.memory import batch_needs, most_slots
    from qwen2_jax.generation import bucket

    at_once = None if options.attention == "cudnn" else most_slots(platform)
    how: dict[str, Any] = {"options": layer_options, "tensor": split.tensor}
    prompt, new = bucket(options.prompt_length), bucket(1 + options.new_tokens)

    def of_batch(rows: int) -> "Needs":
        own = -(-rows // split.rows)
        return batch_needs(model.config, model.dtype, model.weights, own, prompt, new, at_once=at_once, **how)

    def of_prefill(length: int) -> "Needs":
        return batch_needs(model.config, model.dtype, model.weights, 1, bucket(length), 0, **how)

    most = max(options.batches)
    largest, prefill = of_batch(most), of_prefill(options.prefill_length)
    lines = {f"batch of {most}": largest, f"prefill of {options.prefill_length} tokens": prefill}
    _say(
        options,
        *(f"{what}: {_needed(needs)}; free on each device: {free / 1e9:.2f} GB" for what, needs in lines.items()),
    )
    if model.weights > free:
        raise ValueError(
            f"the weights of {model.name} take {model.weights / 1e9:.2f} GB in {model.dtype.name} on each device, of "
            f"which {free / 1e9:.2f} GB are free, so no batch fits; take a smaller size, --dtype bfloat16 or --mesh"
        )
    if largest.total > free:
        fits = bench.largest(lambda rows: of_batch(rows).total <= free, options.batches)
        raise ValueError(
            f"a batch of {most} takes {_needed(largest)}, and {free / 1e9:.2f} GB are free; "
            + (f"the largest that fits is {fits}: --batches {fits}" if fits else "not even one row fits; --mesh")
        )
    if prefill.total > free:
        fits = bench.largest(lambda length: of_prefill(length).total <= free, [options.prefill_length])
        raise ValueError(
            f"a prefill of {options.prefill_length} tokens takes {_needed(prefill)}, and {free / 1e9:.2f} GB are free; "
            f"the longest that fits is --prefill-length {fits}"
        )
    return {"free": free, "needed": {what: {**needs._asdict(), "total": needs.total} for what, needs in lines.items()}}


def _needed(needs: "Needs") -> str:
    parts = f"weights {needs.weights / 1e9:.2f}, keys and values {needs.cache / 1e9:.2f}"
    return f"{needs.total / 1e9:.2f} GB ({parts}, activations {needs.activations / 1e9:.2f})"


def _measured(options: Options, model: _Model, mesh: Any, layer_options: Any, split: Any) -> dict[str, Any]:
    """The ceilings of the devices together, and the results."""
    import jax

    from qwen2_jax.commands.stopwatch import Stopwatch
    from qwen2_jax.evaluation import bench

    stopwatch = Stopwatch()
    _say(options, "ceilings ...")
    one = bench.ceilings(model.dtype, options.repeats)
    count = 1 if mesh is None else mesh.size
    limits = bench.Ceilings(one.copy * count, one.matmul * count)
    _say(options, "weights ...")
    if model.source is None:
        shardings = None
        if mesh is not None:
            from sharding import param_shardings

            shardings = param_shardings(model.config, mesh)
        params = bench.random_params(model.config, model.dtype, shardings)
    else:
        from convert.load import load_open

        params = load_open(model.source, model.dtype, mesh)[1]
    jax.block_until_ready(params)
    running = bench.Bench(
        *(model.config, params, model.dtype, layer_options, options.attention, options.repeats),
        compile_seconds=lambda: stopwatch.seconds["compile"],
        split=split,
    )
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("prefill", lambda: running.prefill(options.prefill_length))
    ]
    for rows in options.batches:
        jobs.append((f"decode, batch {rows}", functools.partial(_decode, running, rows, options)))
    jobs.append(("loglikelihood", lambda: _loglikelihood(running, options)))
    results = []
    for what, job in jobs:
        _say(options, f"{what} ...")
        try:
            results.append(_shares(job(), limits))
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # What was measured so far is worth keeping.
            results.append({"measure": what, "failed": "out of memory"})
    return {"ceilings": dataclasses.asdict(limits), "results": results}


def _decode(running: "Bench", rows: int, options: Options) -> dict[str, Any]:
    return running.decode(rows, options.prompt_length, options.new_tokens)


def _loglikelihood(running: "Bench", options: Options) -> dict[str, Any]:
    import jax

    questions = options.questions or (16 if jax.default_backend() == "cpu" else 128)
    return running.loglikelihood(questions, running.config.max_length or 2048)


def _shares(result: dict[str, Any], limits: "Ceilings") -> dict[str, Any]:
    if "flops_per_second" in result:
        result["share_of_matmul"] = result["flops_per_second"] / limits.matmul
    if "bytes_per_second" in result:
        result["share_of_copy"] = result["bytes_per_second"] / limits.copy
    return result


def _transformers(options: Options, model: _Model, platform: str, free: int) -> dict[str, Any] | None:
    """What transformers does on the same device, if it is to be measured.

    Raises:
      ValueError: if it was asked for and cannot run.
    """
    small = model.weights <= min(_COMPARED_BYTES, free / 2)
    by_itself = options.compare is None and platform == "cpu" and options.mesh is None and small and not _missing()
    if options.compare != "transformers" and not by_itself:
        return None
    if platform not in ("cpu", "gpu") or options.mesh is not None:
        raise ValueError("--compare transformers runs on one CPU or GPU, not on TPUs or a mesh; leave it out")
    _say(options, "transformers ...")
    request = {
        "config": model.config.to_hf(),
        "dtype": model.dtype.name,
        "device": "cuda" if platform == "gpu" else "cpu",
        **{name: getattr(options, name) for name in ("prefill_length", "batches", "prompt_length", "new_tokens")},
        "repeats": options.repeats,
    }
    command = [sys.executable, "-m", "qwen2_jax.evaluation.bench_transformers"]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if by_itself:
            _say(options, f"transformers could not be measured: {last}")
            return None
        raise ValueError(f"--compare transformers: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _compare(report: dict[str, Any]) -> None:
    """Puts transformers' tokens per second, and ours in units of them, beside each result."""
    theirs = {
        (result["measure"], result.get("batch")): result for result in (report["transformers"] or {}).get("results", ())
    }
    for result in report["results"]:
        if (other := theirs.get((result["measure"], result.get("batch")))) and "failed" not in result:
            result["transformers_tokens_per_second"] = other["tokens_per_second"]
            result["ratio"] = result["tokens_per_second"] / other["tokens_per_second"]


def _summary(report: dict[str, Any]) -> str:
    device, limits = report["device"], report["ceilings"]
    compared = report["transformers"] is not None
    head = ["", "tokens/s", "of the ceiling", "attention", "compilation"]
    lines = [[*head, "transformers", "ratio"] if compared else head]
    for result in report["results"]:
        if "failed" in result:
            lines.append([result["measure"], result["failed"], *[""] * (len(lines[0]) - 2)])
            continue
        share = ""
        if "share_of_matmul" in result:
            share = f"{result['share_of_matmul']:.0%} of products"
        if "share_of_copy" in result:
            share = f"{result['share_of_copy']:.0%} of copying"
        line = [_label(result), f"{result['tokens_per_second']:,.1f}", share, result["attention"]]
        line.append(f"{result['compile_seconds']:.1f} s")
        if compared:
            known = "ratio" in result
            line += [
                f"{result['transformers_tokens_per_second']:,.1f}" if known else "",
                f"{result['ratio']:.2f}" if known else "",
            ]
        lines.append(line)
    count = f"{device['count']} x " if device["count"] > 1 else ""
    return (
        f"{report['model']}, {report['dtype']}, on {count}{device['kind']}: copies {limits['copy'] / 1e9:,.1f} GB/s "
        f"(read and written), multiplies {limits['matmul'] / 1e12:,.3f} TFLOP/s\n\n{aligned(lines)}"
    )


def _label(result: dict[str, Any]) -> str:
    if result["measure"] == "prefill":
        return f"prefill, {result['tokens']} tokens"
    if result["measure"] == "decode":
        return f"decode, batch {result['batch']}"
    computed = f"{result['computed_per_second']:,.0f} computed"
    return f"log-likelihoods, given ({computed})"


def _say(options: Options, *lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)
