"""What the evaluations share: their options, the folder that they fill, and what is written there besides scores."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from convert.files import write_whole
from qwen2_jax.commands.session import Attention, Mesh, Session, SessionOptions, attention_option
from qwen2_jax.config import Qwen2Config
from qwen2_jax.evaluation.journal import Journal
from qwen2_jax.evaluation.modes import Modes

_WANTED = ("modes", "lengths", "depths", "samples")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    model: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Folder of a checkpoint, ours or Hugging Face's, or a hub id such as Qwen/Qwen2-0.5B-Instruct (downloaded)."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the results go. An interrupted run goes on with the same command."""
    modes: Annotated[Modes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Modes)
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: as stored)"),
    ] = None
    """Of weights and arithmetic."""
    attention: Annotated[Attention | None, attention_option()] = None
    """How attention over a prompt is computed; cudnn needs an NVIDIA GPU, pallas is for TPUs."""
    mesh: Mesh = None
    """Spread the model over all devices, as in tensor=4,expert=2 (also data, fsdp, context); -1 takes what is left."""
    batch_size: int = 1
    """Prompts or windows of one length that run at once."""
    overwrite: bool = False
    """Begin anew, even if the folder holds results."""
    json: bool = False
    """Print the table as one JSON object, and nothing else."""

    def check(self) -> None:
        """
        Raises:
          ValueError: for options that contradict each other, before anything is read.
        """
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        self.modes.long_contexts()


def open_session(options: EvaluationOptions) -> Session:
    """The checkpoint; its weights are not read yet."""
    return Session(
        SessionOptions(model=options.model, dtype=options.dtype, attention=options.attention, mesh=options.mesh)
    )


def open_journal(name: str, options: EvaluationOptions, settings: Mapping[str, Any]) -> Journal:
    """FOLDER/`name`.jsonl, of a run with these settings.

    Batch size and pieces are no settings: who runs out of memory may go on with smaller ones. Nor is what only says
    which records are wanted: who wants more of them keeps those that are there.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    compared = {key: value for key, value in settings.items() if key not in _WANTED}
    return Journal(options.out / f"{name}.jsonl", compared, options.overwrite)


def shared_settings(options: EvaluationOptions, session: Session) -> dict[str, Any]:
    """The settings that every evaluation has."""
    return {
        "model": options.model,
        "weights": fingerprint(session.folder),
        "dtype": options.dtype,
        "modes": list(options.modes.names),
        **{name: value for name, value in dataclasses.asdict(options.modes).items() if name != "mode"},
    }


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def describe(mode: str, length: int, config: Qwen2Config) -> dict[str, Any]:
    """What a mode came to at a length."""
    return {
        "mode": mode,
        "length": length,
        "yarn": config.yarn and dataclasses.asdict(config.yarn),
        "dual_chunk": config.dual_chunk and dataclasses.asdict(config.dual_chunk),
    }


def publish(
    name: str,
    options: EvaluationOptions,
    report: Mapping[str, Any],
    plot: Callable[[Mapping[str, Any], Path], None],
    summary: str,
) -> None:
    """Writes FOLDER/`name`.json and .png, and prints the summary, or the table for programs."""
    file, picture = (options.out / f"{name}.{kind}" for kind in ("json", "png"))
    report = {**report, "versions": versions()}
    write_whole(file, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    plot(report, picture)
    if options.json:
        print(json.dumps({name: report[name] for name in ("totals", "table") if name in report}))
    else:
        print(f"{summary}\nwritten: {file} and {picture}")


def aligned(rows: list[list[str]]) -> str:
    """Rows of a table as lines, columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def fingerprint(folder: Path) -> str:
    """Changes with the weights, without reading them: our folders have a list of digests, of others take the files'
    sizes and dates."""
    if (manifest := folder / "manifest.json").is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def versions() -> dict[str, str]:
    import jax

    packages = {name: _version(name) for name in ("qwen2-jax", "jax", "flax", "numpy")}
    device = jax.devices()[0]
    return {"python": platform.python_version(), **packages, "device": f"{device.platform}, {device.device_kind}"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"
