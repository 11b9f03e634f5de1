"""Opens a checkpoint, whichever kind it is."""

import os

from convert.chunks import Source
from convert.folder import local_folder
from convert.hugging_face import HuggingFaceSource
from convert.native import MANIFEST, NativeSource


def open_checkpoint(path: str | os.PathLike[str]) -> Source:
    """A checkpoint of either kind, open for reading; a hub id is downloaded first.

    Raises:
      ValueError: for what is missing, damaged or does not fit together.
      OSError: if a file cannot be read.
    """
    folder = local_folder(path)
    return NativeSource(folder) if (folder / MANIFEST).exists() else HuggingFaceSource(folder)
