"""Tokenized documents on disk, mapped into memory: raw tokens in a few files, and where each document begins."""

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import cores, sha256_file, shown

MANIFEST = "manifest.json"
OFFSETS = "offsets.bin"
FORMAT, VERSION = "qwen2_jax tokens", 1

_OPEN_FILES = 256


def tokens_file(number: int) -> str:
    return f"tokens-{number:06d}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds all ids, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_store(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        return False


class TokenStore:
    """Documents by number: a random-access source in the sense of Grain.

    Attributes:
      folder: where it is.
      manifest: what manifest.json says; see docs/data.md.
      tokens: how many there are in all documents together.
    """

    def __init__(self, folder: str | Path):
        """
        Raises:
          ValueError: if `folder` is no token store, is damaged, or is of another version.
        """
        self.folder = Path(folder)
        where = shown(self.folder)
        if not is_store(self.folder):
            raise ValueError(f"{where} is no folder of tokens; `qwen2-jax train tokenize` makes one")
        self.manifest = read_manifest(self.folder)
        self._dtype = np.dtype(self.manifest["dtype"])
        self._files: list[dict[str, Any]] = self.manifest["files"]
        self._begins = [0, *itertools.accumulate(file["tokens"] for file in self._files)]
        self.tokens: int = self._begins[-1]
        self._length: int = self.manifest["documents"]
        expected = {file["name"]: file["tokens"] * self._dtype.itemsize for file in self._files}
        expected[OFFSETS] = (self._length + 1) * 8
        for name, size in expected.items():
            path = self.folder / name
            actual = path.stat().st_size if path.exists() else 0
            if actual != size:
                raise ValueError(f"{shown(path)} is damaged: it has {actual} bytes, expected {size}; tokenize again")
        self._offsets = np.memmap(self.folder / OFFSETS, "<u8", mode="r")
        if self._offsets[-1] != self.tokens:
            raise ValueError(
                f"{shown(self.folder / OFFSETS)} is damaged: it does not end with the tokens; tokenize again"
            )
        self._mapped = functools.lru_cache(_OPEN_FILES)(self._map)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, document: int) -> np.ndarray:
        """All tokens of a document, its end token included, int32."""
        if not 0 <= document < self._length:
            raise IndexError(document)
        return self.read(document, 0, int(self.lengths(np.array([document]))[0]))

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r})"

    @property
    def digest(self) -> str:
        """Of all tokens and of where documents begin: equal for equal content, wherever it is."""
        return self.manifest["digest"]

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """How many tokens these documents have, their end tokens included, int64."""
        return (self._offsets[documents + 1] - self._offsets[documents]).astype(np.int64)

    def read(self, document: int, begin: int, count: int) -> np.ndarray:
        """`count` tokens of a document from its token `begin` on, int32."""
        begin += int(self._offsets[document])
        file = bisect.bisect_right(self._begins, begin) - 1  # no document lies in two files
        begin -= self._begins[file]
        return self._mapped(file)[begin : begin + count].astype(np.int32)

    def damages(self, share: int = 0, shares: int = 1) -> list[str]:
        """Reads all files, or one of so many shares of them, and names those that are not what was written."""
        files = (*self._files, {"name": OFFSETS, "sha256": self.manifest["offsets_sha256"]})[share::shares]
        with ThreadPoolExecutor(cores()) as pool:
            found = pool.map(lambda file: sha256_file(self.folder / file["name"]), files)
            return [
                shown(self.folder / file["name"])
                for file, digest in zip(files, found, strict=True)
                if digest != file["sha256"]
            ]

    def _map(self, file: int) -> np.ndarray:
        return np.memmap(self.folder / self._files[file]["name"], self._dtype, mode="r")


def content_digest(dtype: str, offsets_sha256: str, files_sha256: Sequence[str]) -> str:
    """Of all that a store holds, by the digests of its files in order."""
    content = [dtype, offsets_sha256, list(files_sha256)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json says.

    Raises:
      ValueError: if it is damaged, or of another version.
      OSError: if it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if (version := manifest["version"]) != VERSION:
            raise ValueError(f"{shown(path)} is of version {version!r}, this program reads {VERSION}; tokenize again")
        files, task = manifest["files"], manifest["task"]
        numbers = [manifest[name] for name in ("documents", "tokens", "records", "bad", "empty")]
        numbers += [file[name] for file in files for name in ("documents", "tokens")]
        texts = [manifest["tokenizer"], *manifest["bad_records"], *(file["name"] for file in files)]
        digest = content_digest(manifest["dtype"], manifest["offsets_sha256"], [file["sha256"] for file in files])
        sound = (
            all(type(number) is int and number >= 0 for number in numbers)
            and all(isinstance(text, str) for text in texts)
            and all(Path(file["name"]).name == file["name"] for file in files)
            and all(manifest[name] == sum(file[name] for file in files) > 0 for name in ("documents", "tokens"))
            and manifest["dtype"] in ("<u2", "<u4")
            and isinstance(task["sources"], dict)
            and manifest["digest"] == digest
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError):
        sound = False
    if not sound:
        raise ValueError(f"{shown(path)} is damaged; tokenize again")
    return manifest
