"""Texts to evaluate on: files, and one that is on every machine."""

from collections.abc import Sequence
from pathlib import Path


def read_texts(paths: Sequence[Path]) -> str:
    """The files' texts, one after the other, each ending with a newline.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if one is not UTF-8, or holds no text.
    """
    return "".join(map(_read_text, paths))


def library_text() -> str:
    """The Python language reference as `help()` shows it: about 460,000 characters, 106,000 tokens of Qwen's.

    Real English prose that comes with the interpreter. It changes a little from one Python to the next, as do results.
    """
    from pydoc_data.topics import topics

    return "".join(f"{topics[name].strip()}\n\n" for name in sorted(topics))


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text.replace("\r\n", "\n").removesuffix("\n") + "\n"
