"""`python -m benchmarks`: the model beside transformers; `... convert`: the converter beside cp; `... attention`: Dual
Chunk Attention beside plain attention; `... moe`: the mixture of experts beside dense products and transformers;
`... training`: training steps beside transformers; `... harness`: evaluations beside lm-evaluation-harness's own
model."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from benchmarks import attention, conversion, harness, machine, moe, side_by_side, table, training
from benchmarks.checkpoints import SIZES
from benchmarks.moe_block import Shape
from qwen2_jax.command import exit_code, parse
from qwen2_jax.dual_chunk import DualChunk

Out = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Common:
    repeats: int = 5
    """Measurements of each kind, one framework after the other; medians are shown."""
    json: Out = None
    """File to write everything measured to."""
    markdown: Out = None
    """Markdown file whose block of this benchmark is replaced by the new table."""
    scratch: Out = None
    """Existing folder for temporary checkpoints; by default the system's, which must not be in memory."""

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")
        if self.json and not self.json.parent.is_dir():
            raise ValueError(f"--json {self.json}: there is no folder {self.json.parent}")
        if self.scratch and not self.scratch.is_dir():
            raise ValueError(f"--scratch {self.scratch}: there is no such folder")


@dataclasses.dataclass(frozen=True)
class Speed(Common):
    """Measure prefill, decoding, loading and memory with random weights, beside transformers on the same CPU.

    Where PyTorch is not installed, or JAX has an accelerator, this project alone. `convert` measures the converter,
    `attention` Dual Chunk Attention, `moe` the mixture of experts, `training` training steps, `harness` evaluations.
    """

    size: str = "qwen2-0.5b"
    """Shape of the model: a published name, or "tiny"."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Number formats to measure."""

    def __post_init__(self):
        super().__post_init__()
        if self.size not in SIZES:
            raise ValueError(f"unknown --size {self.size!r}; known are {', '.join(SIZES)}")

    @property
    def measured(self) -> str:
        """The options that shape the measurement."""
        return f"--size {self.size} --dtype {' '.join(self.dtype)} --repeats {self.repeats}"


@dataclasses.dataclass(frozen=True)
class Convert(Common):
    """Measure `qwen2-jax convert` from and to Hugging Face, beside sha256sum and cp of the same bytes."""

    gigabytes: float = 2.0
    """Size of the checkpoint, in 10^9 bytes of bfloat16 weights."""
    max_host_memory: str = "512MB"
    """Passed on to the converter."""

    def __post_init__(self):
        super().__post_init__()
        if not self.gigabytes > 0:
            raise ValueError(f"--gigabytes must be positive, got {self.gigabytes}")

    @property
    def measured(self) -> str:
        """The options that shape the measurement."""
        return (
            f"convert --gigabytes {self.gigabytes:g} --max-host-memory {self.max_host_memory} --repeats {self.repeats}"
        )


@dataclasses.dataclass(frozen=True)
class Attention(Common):
    """Measure Dual Chunk Attention beside plain attention of the same path, forward and backward."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """Tokens of the one row."""
    chunk_size: int = 2112
    """C; the default makes chunks of 2048."""
    local_size: int = 64
    implementation: Literal["chunked", "cudnn", "pallas"] = "chunked"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        super().__post_init__()
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"--lengths must be at least 1, got {self.lengths}")
        DualChunk(self.chunk_size, self.local_size)

    @property
    def measured(self) -> str:
        """The options that shape the measurement."""
        lengths = " ".join(map(str, self.lengths))
        sizes = f"--chunk-size {self.chunk_size} --local-size {self.local_size}"
        how = f"--implementation {self.implementation} --dtype {self.dtype} --repeats {self.repeats}"
        return f"attention --lengths {lengths} {sizes} {how}"


@dataclasses.dataclass(frozen=True)
class MoE(Common):
    """Measure one sparse block, forward and backward, beside dense products and beside transformers.

    Also over 8 simulated devices. Where PyTorch is not installed, without transformers.
    """

    size: Literal["half", "tiny"] = "half"
    """Shape: "half" has the proportions of Qwen1.5-MoE-A2.7B at half its widths."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Number formats to measure."""

    @property
    def shape(self) -> Shape:
        return Shape() if self.size == "half" else Shape(length=16, width=32, inner=16, shared_inner=24)

    @property
    def measured(self) -> str:
        """The options that shape the measurement."""
        return f"moe --size {self.size} --dtype {' '.join(self.dtype)} --repeats {self.repeats}"


@dataclasses.dataclass(frozen=True)
class Training(Common):
    """Measure training steps with random weights, beside transformers with PyTorch's AdamW on the same device.

    Masters are float32 on both sides. Where PyTorch is not installed, this project alone.
    """

    size: str = "small"
    """Shape of the model: "small" (51 M parameters), "tiny", or a published name."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Number formats of activations and products to measure."""
    batch: int = 4
    """Rows of a step."""
    seq: int = 512
    """Tokens of a row."""
    remat: Literal["none", "projections", "attention", "full"] = "projections"
    """What is computed again in the backward pass; transformers: nothing, or from "attention" on all of a layer."""
    steps: int = 3
    """Steps of one measurement."""

    def __post_init__(self):
        super().__post_init__()
        if self.size not in training.SIZES:
            raise ValueError(f"unknown --size {self.size!r}; known are {', '.join(training.SIZES)}")
        for name in ("batch", "seq", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")

    @property
    def measured(self) -> str:
        """The options that shape the measurement."""
        work = f"--batch {self.batch} --seq {self.seq} --remat {self.remat} --steps {self.steps}"
        return f"training --size {self.size} --dtype {' '.join(self.dtype)} {work} --repeats {self.repeats}"


@dataclasses.dataclass(frozen=True)
class Harness(Common):
    """Measure evaluations by lm-evaluation-harness in float32, beside the harness's own Hugging Face model.

    Random weights and made-up words. Where PyTorch is not installed, this project alone.
    """

    size: Literal["small", "tiny"] = "small"
    """Shape of the model, and with it how many requests there are: "small" has 39 M parameters."""

    @property
    def measured(self) -> str:
        """The options that shape the measurement."""
        return f"harness --size {self.size} --repeats {self.repeats}"


KINDS: dict[str, type[Common]] = {
    "speed": Speed,
    "convert": Convert,
    "attention": Attention,
    "moe": MoE,
    "training": Training,
    "harness": Harness,
}


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> None:
    named = argv and argv[0] in KINDS
    kind, rest = (argv[0], argv[1:]) if named else ("speed", argv)
    options: Any = parse(KINDS[kind], rest, prog=f"python -m benchmarks {kind}" if named else "python -m benchmarks")
    if options.markdown:
        table.check_markdown(options.markdown, kind)
    about = machine.describe()
    if about["load_average"] > 0.5:
        machine.say(
            f"warning: the machine is busy (load average {about['load_average']:.1f}); timings will be too slow"
        )
    place = options.scratch.resolve() if options.scratch else None
    with tempfile.TemporaryDirectory(prefix="qwen2-jax-benchmark-", dir=place) as folder:
        if kind == "convert":
            report = conversion.measure(Path(folder), options.gigabytes, options.max_host_memory, options.repeats)
        elif kind == "attention":
            sizes = DualChunk(options.chunk_size, options.local_size)
            report = attention.measure(options.lengths, sizes, options.implementation, options.dtype, options.repeats)
        elif kind == "moe":
            report = moe.measure(options.dtype, options.repeats, options.shape)
        elif kind == "training":
            work = training.Work(options.batch, options.seq, options.remat, options.steps)
            report = training.measure(Path(folder), options.size, options.dtype, options.repeats, work)
        elif kind == "harness":
            report = harness.measure(Path(folder), options.size, options.repeats)
        else:
            report = side_by_side.measure(Path(folder), options.size, options.dtype, options.repeats)
    report = {"command": f"python -m benchmarks {options.measured}", "machine": about, **report}
    table.show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        table.write_markdown(report, options.markdown)


if __name__ == "__main__":
    raise SystemExit(main())
