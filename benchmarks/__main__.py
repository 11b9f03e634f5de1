"""`python -m benchmarks`: the model beside transformers. `python -m benchmarks convert`: the converter beside cp."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from benchmarks import conversion, machine, side_by_side, table
from benchmarks.checkpoints import SIZES
from qwen2_jax.command import exit_code, parse

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

    Where PyTorch is not installed, or JAX has an accelerator, this project alone. `convert` measures the converter.
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


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> None:
    converting = list(argv[:1]) == ["convert"]
    if converting:
        options: Any = parse(Convert, argv[1:], prog="python -m benchmarks convert")
    else:
        options = parse(Speed, argv, prog="python -m benchmarks")
    if options.markdown:
        table.check_markdown(options.markdown, "convert" if converting else "speed")
    about = machine.describe()
    if about["load_average"] > 0.5:
        machine.say(f"warning: the machine is busy (load average {about['load_average']:.1f}); the numbers will be low")
    place = options.scratch.resolve() if options.scratch else None
    with tempfile.TemporaryDirectory(prefix="qwen2-jax-benchmark-", dir=place) as folder:
        if converting:
            report = conversion.measure(Path(folder), options.gigabytes, options.max_host_memory, options.repeats)
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
