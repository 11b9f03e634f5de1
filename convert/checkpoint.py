"""Opens a checkpoint, whichever kind it is."""

import os
from pathlib import Path

from convert.chunks import Source
from convert.folder import local_folder
from convert.hugging_face import HuggingFaceSource
from convert.native import MANIFEST, NativeSource
from convert.step_folder import is_step_folder, is_unfinished
from convert.step_source import StepSource


def open_checkpoint(path: str | os.PathLike[str], allow_pickle: bool = False) -> Source:
    """A checkpoint of any kind, open for reading; a hub id is downloaded first.

    Args:
      path: the folder or id.
      allow_pickle: read PyTorch .bin files where there are no safetensors.

    Raises:
      ValueError: for what is missing, damaged or does not fit together.
      OSError: if a file cannot be read.
    """
    folder = local_folder(path, "pickles" if allow_pickle else "safetensors")
    if (folder / MANIFEST).exists():
        return open_own(folder)
    if is_unfinished(folder):
        raise ValueError(
            f"{folder} is a step whose save never came to its end; take the step before, or resume the run"
        )
    return HuggingFaceSource(folder, allow_pickle)


def open_own(folder: Path) -> NativeSource | StepSource:
    """A checkpoint folder of ours, or a step of a training run. Raises as `open_checkpoint`."""
    return StepSource(folder) if is_step_folder(folder) else NativeSource(folder)
