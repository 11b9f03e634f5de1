"""Sources of training: token stores as they are, other files tokenized once, into a cache, when training begins."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from convert.files import expanded, shown
from qwen2_jax.tokenizer import Tokenizer
from train.data.encode import Encoding, tokenizer_digest
from train.data.files import find_files
from train.data.readers import MAX_BAD_RECORDS
from train.data.store import TokenStore, is_store
from train.data.tokenize import Tokenized, task_of, tokenize


class Source(NamedTuple):
    """Documents, and how much of them a mixture has."""

    store: TokenStore
    weight: float = 1.0
    """The share of rows, relative to the other sources' weights."""


def open_store(
    paths: Sequence[str],
    how: Encoding,
    cache: Path,
    *,
    kind: str | None = None,
    max_bad_records: int = MAX_BAD_RECORDS,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[Tokenized], object] = lambda done: None,
) -> TokenStore:
    """The tokens of one source: a folder that `tokenize` made, or files, which are tokenized into a folder of `cache`.

    The folder's name follows from the files (path, size, time of modification), the tokenizer and the options: the next
    run finds it, and any number of processes that share `cache` make it once.

    Args:
      paths: one folder of tokens, or files, folders and globs as of `find_files`.
      how: the tokenizer, which must be that of a folder of tokens too; the rest is for files.
      cache: a folder; made if need be.
      report: is told what became of files, by an earlier run too: how many records were skipped, and some of them.

    Raises:
      ValueError: as `TokenStore` and `tokenize`, or for tokens of another tokenizer.
      OSError: if a file cannot be read or written.
    """
    stores = [path for path in map(expanded, paths) if is_store(path)]
    if stores:
        if len(paths) > 1:
            raise ValueError(
                f"{shown(stores[0])} is a folder of tokens, and cannot be one source together with other paths; "
                "make it a source of its own"
            )
        store = TokenStore(stores[0])
        digest = tokenizer_digest(Tokenizer.from_folder(expanded(how.tokenizer)))
        if store.manifest["tokenizer"] != digest:
            raise ValueError(
                f"{shown(stores[0])} holds tokens of another tokenizer than {shown(how.tokenizer)}; tokenize its "
                "sources with this one"
            )
        return store
    task = task_of(find_files(paths, kind), how)
    folder = expanded(cache) / hashlib.sha256(json.dumps(task).encode()).hexdigest()[:16]
    done = tokenize(
        paths, folder, how, kind=kind, max_bad_records=max_bad_records, workers=workers, wait=True, progress=progress
    )
    report(done)
    return TokenStore(folder)
