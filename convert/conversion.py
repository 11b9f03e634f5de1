"""Hugging Face folder -> ours, and back; and what every job that makes a checkpoint of another one has in common."""

import dataclasses
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import open_own
from convert.chunks import FolderSource
from convert.destination import check_apart, check_destination, is_finished, work_folder
from convert.dtypes import FLOAT32, weight_dtype
from convert.files import expanded, first_bytes, identity, listing, shown
from convert.folder import carried_files, check_vocabulary, config_bytes, local_folder, splitting_warnings
from convert.hugging_face import HuggingFaceSink, HuggingFaceSource
from convert.names import arrays_of
from convert.native import MANIFEST, NativeSink, NativeSource
from convert.step_folder import meant_step, newest_step
from convert.step_source import StepSource, reading_bytes
from convert.stream import Part, Progress, Tally, copy_arrays
from convert.workspace import Workspace, open_workspace, remove_leftovers
from qwen2_jax.json_object import brief


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did."""

    destination: str
    already_complete: bool = False
    """The destination was what was asked for, and nothing was done."""
    arrays: int = 0
    parameters: int = 0
    bytes: int = 0
    bytes_resumed: int = 0
    """Of these, kept from an earlier run that was cut off, after checking them."""
    seconds: float = 0.0
    rounded: str = ""
    """From which number formats to which, as "float32 to bfloat16"; empty if no numbers were rounded."""
    warnings: tuple[str, ...] = ()


def convert_from_hf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: object = None,
    max_host_memory: int | str = "2GiB",
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Converts a Hugging Face folder or hub id to a checkpoint folder of ours.

    Args:
      source: the folder, or an id such as "Qwen/Qwen2-0.5B", which is downloaded.
      destination: created when complete. The work is kept in `destination`.partial until then; after a crash the same
        call finishes it.
      dtype: of the weights written: bfloat16, float16 or float32. None keeps each one's.
      max_host_memory: what a process doing nothing else may take up, as bytes or as text such as "512MB". Does not hold
        for .bin files.
      overwrite: replace a checkpoint at `destination`, once the new one is complete.
      allow_pickle: read PyTorch .bin files where there are no safetensors.
      progress: called with bytes done and bytes in all.

    Raises:
      ValueError: for bad input, a destination that may not be replaced, or one that another process is writing.
      OSError: for files that cannot be read or written.
    """
    folder = local_folder(source, "pickles" if allow_pickle else "safetensors")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} is a checkpoint of ours already; `to-hf` converts it back")
    opened = HuggingFaceSource(folder, allow_pickle)
    options = {"job": "from-hf", "dtype": weight_dtype(dtype).name if dtype else None}
    watched = [file.path for file in opened.files]

    def write(work: Workspace, dtypes: dict[str, np.dtype], memory: int) -> Tally:
        sink = NativeSink(work.folder, opened.arrays, dtypes)
        parts = [Part(path, chunk) for path in opened.arrays for chunk in sink.chunks(path)]
        tally = copy_arrays(opened, sink, parts, work, memory, progress)
        _copy_files(opened, work.folder, dtypes)
        sink.finish(tally.digests)
        return tally

    return run_conversion(opened, watched, Path(destination), options, dtype, max_host_memory, overwrite, write)


def convert_to_hf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: object = None,
    shard_size: int | str = "5GB",
    fused_experts: bool = False,
    max_host_memory: int | str = "2GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Converts a checkpoint folder of ours to a Hugging Face folder: the files that transformers itself would write.

    Args:
      source: the folder, or a step of a training run.
      dtype: of the weights written: bfloat16, float16 or float32. None keeps each one's; of a training step, whose
        masters are wider than the model that they become, it takes what config.json says.
      shard_size: bytes of weights per file at most, as a number or as text such as "5GB"; one file if all fits.
      fused_experts: write all experts of a layer into one tensor, as transformers 5 holds them, instead of one each.

    The other arguments, and what is raised, are as in `convert_from_hf`.
    """
    folder = expanded(source)
    if not (folder / MANIFEST).is_file():
        hint = ""
        if step := meant_step(folder):
            hint = f"; did you mean {shown(step)}?"
        elif step := newest_step(folder):
            hint = f"; the run's newest step is {shown(step)}"
        raise ValueError(f"{shown(folder)} is not a checkpoint of ours: it has no {MANIFEST}{hint}")
    opened = open_own(folder)
    if dtype is None and isinstance(opened, StepSource):
        dtype = opened.weight_dtype
    resident = reading_bytes(opened) if isinstance(opened, StepSource) else 0
    check_vocabulary(folder, opened.config)
    limit = parse_size(shard_size)
    options = {
        "job": "to-hf",
        "dtype": weight_dtype(dtype).name if dtype else None,
        "shard_size": limit,
        "fused_experts": fused_experts,
    }

    def write(work: Workspace, dtypes: dict[str, np.dtype], memory: int) -> Tally:
        sink = HuggingFaceSink(work.folder, arrays_of(opened.config, fused_experts), dtypes, limit)
        parts = [Part(path, chunk) for path in opened.arrays for chunk in opened.chunks(path)]
        tally = copy_arrays(opened, sink, parts, work, memory, progress, resident)
        _copy_files(opened, work.folder, dtypes)
        sink.finish()
        return tally

    report = run_conversion(
        opened, [folder / MANIFEST], Path(destination), options, dtype, max_host_memory, overwrite, write
    )
    return dataclasses.replace(report, warnings=(*report.warnings, *splitting_warnings(folder)))


def parse_size(size: int | str) -> int:
    """Bytes in `size`: a number, or text such as "512MB" (powers of 1000) or "2GiB" (powers of 1024).

    Raises:
      ValueError: for anything else, and for less than a byte.
    """
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    count = 0
    if match and (match[2] or not match[3]):
        count = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if count < 1:
        raise ValueError(f"{brief(size)} is not a size; examples are 512MB, 2GiB and 1000000")
    return count


def run_conversion(
    source: FolderSource,
    watched: list[Path],
    destination: Path,
    options: dict[str, Any],
    dtype: object,
    max_host_memory: int | str,
    overwrite: bool,
    write: Callable[[Workspace, dict[str, np.dtype], int], Tally],
) -> Report:
    """What all jobs share: refuse what is unsafe, skip what is done, do the work, publish it, report.

    Args:
      source: what is written.
      watched: files that numbers are read from.
      destination: the folder to make.
      options: JSON that says, with the state of the source's files, what is being made of it.
      dtype: of the weights written, or None.
      max_host_memory: as the user wrote it.
      overwrite: whether a checkpoint at `destination` may be replaced.
      write: fills a work folder, given each array's dtype and the memory in bytes.

    Raises:
      ValueError: for a destination or another option that cannot be had, or a source that changes meanwhile.
      OSError: for files that cannot be read or written.
    """
    memory = parse_size(max_host_memory)
    destination = Path(os.path.realpath(expanded(destination)))
    for place in (destination, work_folder(destination)):
        check_apart(place, [source.folder, *_read_files(source.folder, watched)])
    task = options | _snapshot(source.folder, watched)
    if not overwrite and is_finished(destination, task):
        remove_leftovers(destination)
        return Report(str(destination), already_complete=True)
    check_destination(destination, overwrite)
    target = weight_dtype(dtype) if dtype else None
    dtypes = {path: target or stored for path, stored in source.dtypes.items()}
    sizes = {path: array.size for path, array in source.arrays.items()}
    with open_workspace(destination, task, overwrite) as work:
        _check_space(work, sum(size * dtypes[path].itemsize for path, size in sizes.items()))
        tally = write(work, dtypes, memory)
        if options | _snapshot(source.folder, watched) != task:
            raise ValueError(f"{source.folder} changed while it was being converted; run the command again")
        work.publish()
    warnings = [
        *([work.discarded] if work.discarded else []),
        *_warning("NaN or infinite", tally.nonfinite),
        *_warning(f"too large for {target}, now infinite", tally.overflowed),
    ]
    return Report(
        str(destination),
        arrays=len(sizes),
        parameters=sum(sizes.values()),
        bytes=tally.bytes_total,
        bytes_resumed=tally.bytes_resumed,
        seconds=tally.seconds,
        rounded=_rounded(set(source.dtypes.values()), target),
        warnings=tuple(warnings),
    )


def _rounded(stored: set[np.dtype], target: np.dtype | None) -> str:
    if target is None or target == FLOAT32:
        return ""
    others = sorted(dtype.name for dtype in stored - {target})
    return f"{' and '.join(others)} to {target}" if others else ""


def _read_files(folder: Path, watched: list[Path]) -> list[Path]:
    return [folder / "config.json", *carried_files(folder), *watched]


def _snapshot(folder: Path, watched: list[Path]) -> dict[str, Any]:
    """What identifies the source and its state, cheaply: where it is, and of every file that is read what the system
    tells and a digest of its begin, which covers small files and the headers of large ones."""
    return {
        "source": os.path.realpath(folder),
        "files": {
            path.name: {**identity(path.stat()), "content": hashlib.sha256(first_bytes(path)).hexdigest()}
            for path in _read_files(folder, watched)
        },
    }


def _copy_files(
    source: HuggingFaceSource | NativeSource | StepSource, folder: Path, dtypes: dict[str, np.dtype]
) -> None:
    for path in carried_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    if dtypes == source.dtypes and not isinstance(source, StepSource):
        shutil.copyfile(source.folder / "config.json", folder / "config.json")
    else:
        written = next(iter(dtypes.values()))
        (folder / "config.json").write_bytes(config_bytes(source.config, written))


def _check_space(work: Workspace, needed: int) -> None:
    """Refuses at once what cannot fit; files of an earlier run take part of the room already."""
    present = sum(path.stat().st_blocks * 512 for path in work.folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(work.folder).free + present
    if free < needed:
        raise OSError(f"{work.destination} takes {needed / 1e9:.2f} GB, but its disk has only {free / 1e9:.2f} GB free")


def _warning(what: str, counts: Counter[str]) -> list[str]:
    if not counts:
        return []
    tensors = [f"{name}: {count}" for name, count in counts.items()]
    return [f"{sum(counts.values())} weights are {what}: {listing({'tensors': tensors})}"]
