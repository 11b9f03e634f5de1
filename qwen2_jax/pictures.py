"""What all pictures share: colors that colour-blind readers can tell apart, and files that are whole."""

import os
from pathlib import Path

from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's palette, without its yellows, which are faint on white."""


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG at 150 dpi, whole or not at all. Raises OSError if it cannot be written."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=150)
    os.replace(unfinished, path)
