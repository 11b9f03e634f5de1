"""One part of the sources to one file of tokens: what a worker does."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.files import write_whole
from qwen2_jax.tokenizer import Tokenizer
from train.data.readers import Bad, Part, read
from train.data.store import token_dtype, tokens_file

END_OF_DOCUMENT = "<|endoftext|>"
PARTS = "parts"
"""In a folder of unfinished work: what is not in the finished one."""
NAMED = 100
"""Bad records of a part that are described; all are counted."""

_BATCH_CHARACTERS, _BATCH_TEXTS = 1 << 20, 512


class Encoding(NamedTuple):
    """How texts become tokens."""

    tokenizer: str
    """A folder."""
    field: str = "text"
    """Of records that are objects or rows: the one that holds the text."""
    end: str | None = None
    """The token that ends every document; by default <|endoftext|>, or else the tokenizer's end-of-text token."""
    control_tokens: bool = False
    """Whether texts may name control tokens: by default a text's own "<|endoftext|>" is ordinary characters."""


class TooManyBad(Exception):
    """With the bad records and how many there are."""


def end_id(tokenizer: Tokenizer, end: str | None) -> int:
    """The token that ends a document.

    Raises:
      ValueError: if the tokenizer does not have it.
    """
    named = END_OF_DOCUMENT if end is None else end
    id = tokenizer.backend.token_to_id(named)
    if id is None and end is None and tokenizer.eos_ids:
        id = tokenizer.eos_ids[0]
    if id is None:
        raise ValueError(f"the tokenizer has no token {named!r} to end documents with; name another")
    return id


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of the vocabulary and the merges: equal for tokenizer.json and for vocab.json with merges.txt."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    vocabulary = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[::-1])
    return hashlib.sha256(json.dumps([vocabulary, merges]).encode()).hexdigest()


class Encoder:
    """Writes parts into a folder."""

    def __init__(self, folder: Path, how: Encoding):
        """
        Raises:
          OSError, ValueError: as `Tokenizer.from_folder` and `end_id`.
        """
        self._folder, self._how = folder, how
        self._tokenizer = Tokenizer.from_folder(how.tokenizer)
        self._end = end_id(self._tokenizer, how.end)
        self._dtype = token_dtype(self._tokenizer.vocab_size)

    def write(self, number: int, part: Part, max_bad: int) -> dict[str, Any]:
        """Writes tokens, lengths and receipt of a part, each under its name only when it is whole; gives the receipt.

        Raises:
          TooManyBad: if more than `max_bad` records are bad; then nothing is left behind.
          OSError: if a file cannot be read or written.
        """
        bad: list[Bad] = []
        counts = {"records": 0, "bad": 0, "empty": 0}
        lengths: list[int] = []
        sha = hashlib.sha256()
        place = self._folder / tokens_file(number)
        beside = self._folder / PARTS / f"{place.name}.{os.getpid()}"
        try:
            with beside.open("wb") as file:
                for texts in _batches(self._sound(part, bad, counts, max_bad)):
                    for ids in self._encode(texts):
                        data = np.array([*ids, self._end], self._dtype)
                        sha.update(data.data)
                        file.write(data.data)
                        lengths.append(len(data))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)
        numbers = np.array(lengths, "<u8").tobytes()
        receipt = {
            **counts,
            "documents": len(lengths),
            "tokens": sum(lengths),
            "sha256": sha.hexdigest(),
            "lengths_sha256": hashlib.sha256(numbers).hexdigest(),
            "named": [list(record) for record in bad[:NAMED]],
        }
        write_whole(lengths_file(self._folder, number), numbers, beside.parent)
        write_whole(receipt_file(self._folder, number), json.dumps(receipt).encode(), beside.parent)
        return receipt

    def _sound(self, part: Part, bad: list[Bad], counts: dict[str, int], max_bad: int) -> Iterator[str]:
        for text in read(part, self._how.field):
            if isinstance(text, str):
                counts["records"] += 1
                if text:
                    yield text
                else:
                    counts["empty"] += 1
                continue
            counts["records"] += text.records
            counts["bad"] += text.records
            bad.append(text)
            if counts["bad"] > max_bad:
                raise TooManyBad(bad[:NAMED], counts["bad"])

    def _encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        backend = self._tokenizer.backend
        backend.encode_special_tokens = not self._how.control_tokens
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def lengths_file(folder: Path, number: int) -> Path:
    """How many tokens each document of a part has, in unfinished work: little-endian uint64."""
    return folder / PARTS / f"{number:06d}.lengths"


def receipt_file(folder: Path, number: int) -> Path:
    """What a part came to, as JSON, in unfinished work; written last, so a part that has one is whole."""
    return folder / PARTS / f"{number:06d}.json"


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
