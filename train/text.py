"""The data of pre-training: text of a run's options, tokenized, mixed and packed."""

from collections.abc import Sequence
from pathlib import Path

import jax

from convert.files import expanded
from qwen2_jax.progress import byte_progress
from train.data.batches import Rows
from train.data.encode import Encoding
from train.data.files import check_apart
from train.data.packing import packed_rows
from train.data.source import Source, open_store
from train.data.store import MANIFEST, TokenStore
from train.data.tokenize import Tokenized
from train.data.tokenize_job import warn_of_skipped
from train.run import Phase, Run
from train.training import RowsOf, ValidationRowsOf, tokenizer_of

_TOKENS = "tokens"


def rows_of_text(run: Run) -> RowsOf:
    """Rows of a phase, its documents in an order of their own.

    Raises:
      ValueError: if a phase names no data, or not one weight for each. The function returned: as `open_store` and
        `packed_rows`, and for tokens that are not what was written.
      OSError: the function returned, if data cannot be read, or tokens cannot be written.
    """
    assert run.out is not None
    for phase in run.stretches:
        paths, weights = phase.data or (), phase.weights or ()
        if not paths:
            raise ValueError("--data is missing: name folders of tokens, or text")
        check_apart(run.out, paths)
        if weights and len(weights) != len(paths):
            raise ValueError(f"--weights has {len(weights)} numbers for the {len(paths)} of --data; give one for each")

    sound: set[Path] = set()

    def rows_of(number: int, phase: Phase) -> Rows:
        assert phase.data is not None
        # A phase does not begin with the documents that the one before it began with.
        return _rows(run, phase.data, phase.weights or (), phase, run.text.seed + number, sound)

    return rows_of


def validation_rows_of_text(run: Run) -> ValidationRowsOf | None:
    """Rows of the text to validate on, if there is any; raises as what `rows_of_text` returns.

    They do not depend on the run's seed, so that losses of runs can be compared.
    """
    assert run.out is not None
    paths, sound = run.held_out.validation_data, set[Path]()
    check_apart(run.out, paths)
    return (lambda phase: _rows(run, paths, (), phase, 0, sound)) if paths else None


def _rows(run: Run, paths: Sequence[str], weights: Sequence[float], phase: Phase, seed: int, sound: set[Path]) -> Rows:
    """`sound`: stores that were read and compared with their digests; gets those that are now."""
    assert run.out is not None and phase.seq is not None
    how = Encoding(str(tokenizer_of(run)), run.text.field)
    cache = expanded(run.text.cache or run.out / _TOKENS)
    most, first = run.text.max_bad_records, jax.process_index() == 0
    stores, done = [], list[Tokenized]()
    for path in paths:
        with byte_progress(f"tokenizing {path}", quiet=not first) as progress:
            stores.append(open_store([path], how, cache, max_bad_records=most, progress=progress, report=done.append))
    for tokenized in done if first else ():
        warn_of_skipped(tokenized)
    for store in stores:
        if not run.text.no_verify_data and store.folder not in sound:
            _verify(store)
            sound.add(store.folder)
    shares = weights or [float(store.tokens) for store in stores]
    sources = [Source(store, weight) for store, weight in zip(stores, shares, strict=True)]
    return packed_rows(sources, phase.seq, seed)


def _verify(store: TokenStore) -> None:
    """Each process reads a share of the files. Raises ValueError for those that are damaged, naming the first."""
    if wrong := store.damages(jax.process_index(), jax.process_count()):
        others = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{wrong[0]} is damaged: its sha256 differs from the one in {MANIFEST}{others}; tokenize again, or take a "
            "sound copy"
        )
