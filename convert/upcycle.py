"""Dense checkpoint -> mixture of experts: the upcycling of Qwen2-57B-A14B, streaming and resumable."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np

from convert.checkpoint import open_own
from convert.conversion import Report, run_conversion
from convert.dtypes import weight_dtype
from convert.files import shown
from convert.folder import carried_files, check_vocabulary, config_bytes, local_folder
from convert.hugging_face import HuggingFaceSource
from convert.native import MANIFEST, NativeSink, NativeSource
from convert.step_source import StepSource
from convert.stream import Part, Progress, Tally, copy_arrays
from convert.upcycle_recipe import Recipe
from convert.upcycled_source import UpcycledSource
from convert.workspace import Workspace

__all__ = ["Recipe", "upcycle"]

_VERSION = 1  # of what is drawn for a seed: unfinished work of another one is not gone on with


def upcycle(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: Recipe,
    dtype: object = None,
    max_host_memory: int | str = "2GiB",
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Makes a mixture of experts of a dense model: a checkpoint folder of ours, which `convert_to_hf` exports.

    Every layer's FFN becomes routed experts and a shared expert, as `recipe` says; attention, norms and embeddings are
    the dense model's, bit for bit. The same dense checkpoint, recipe and dtype make the same weights, whatever the
    number of threads and the memory, in one run or several.

    Args:
      source: the dense model: a Hugging Face folder, a hub id, which is downloaded, or a checkpoint folder of ours.
      destination: created when complete. The work is kept in `destination`.partial until then; after a crash the same
        call finishes it.
      recipe: how the experts are made.
      dtype: of the weights written: bfloat16, float16 or float32. None keeps each one's.
      max_host_memory: what a process doing nothing else may take up, as bytes or as text such as "512MB". One matrix of
        a dense layer must fit. Does not hold for .bin files.
      overwrite: replace a checkpoint at `destination`, once the new one is complete.
      allow_pickle: read PyTorch .bin files where there are no safetensors.
      progress: called with bytes done and bytes in all.

    Raises:
      ValueError: for bad input, a model that is no dense one, a destination that may not be replaced, or one that
        another process is writing.
      OSError: for files that cannot be read or written.

    Source: Qwen2 technical report (arXiv 2407.10671), section 2.2.2; `Recipe` says what it leaves open.
    """
    folder = local_folder(source, "pickles" if allow_pickle else "safetensors")
    dense: NativeSource | StepSource | HuggingFaceSource
    if (folder / MANIFEST).exists():
        dense, watched = open_own(folder), [folder / MANIFEST]
        check_vocabulary(folder, dense.config)
    else:
        dense = HuggingFaceSource(folder, allow_pickle)
        watched = [file.path for file in dense.files]
    try:
        opened = UpcycledSource(dense, recipe)
    except ValueError as error:
        raise ValueError(f"{shown(folder)}: {error}") from None
    options = {
        "job": "upcycle",
        "version": _VERSION,
        "dtype": weight_dtype(dtype).name if dtype else None,
        **dataclasses.asdict(recipe),
    }

    def write(work: Workspace, dtypes: dict[str, np.dtype], memory: int) -> Tally:
        sink = NativeSink(work.folder, opened.arrays, dtypes)
        parts = [Part(path, chunk) for path in opened.order for chunk in sink.chunks(path)]
        tally = copy_arrays(opened, sink, parts, work, memory, progress, opened.resident_bytes)
        for path in carried_files(folder):
            if path.name != "README.md":  # describes another model
                shutil.copyfile(path, work.folder / path.name)
        written = dtypes["embed.embedding"]
        (work.folder / "config.json").write_bytes(config_bytes(opened.config, written))
        sink.finish(tally.digests)
        return tally

    return run_conversion(opened, watched, Path(destination), options, dtype, max_host_memory, overwrite, write)
