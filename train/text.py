"""The data of pre-training: text of a run's options, tokenized, mixed and packed."""

from collections.abc import Sequence

import jax

from convert.files import expanded
from qwen2_jax.progress import byte_progress
from train.data.encode import Encoding
from train.data.packing import Rows, packed_rows
from train.data.source import Source, open_store
from train.data.tokenize import Tokenized
from train.data.tokenize_job import warn_of_skipped
from train.run import Phase, Run
from train.training import RowsOf, ValidationRowsOf, tokenizer_of

_TOKENS = "tokens"


def rows_of_text(run: Run) -> RowsOf:
    """Rows of a phase, its documents in an order of their own.

    Raises:
      ValueError: if a phase names no data, or not one weight for each. The function returned: as `open_store` and
        `packed_rows`.
      OSError: the function returned, if data cannot be read, or tokens cannot be written.
    """
    for phase in run.stretches:
        paths, weights = phase.data or (), phase.weights or ()
        if not paths:
            raise ValueError("--data is missing: name folders of tokens, or text")
        if weights and len(weights) != len(paths):
            raise ValueError(f"--weights has {len(weights)} numbers for the {len(paths)} of --data; give one for each")

    def rows_of(number: int, phase: Phase) -> Rows:
        assert phase.data is not None
        # A phase does not begin with the documents that the one before it began with.
        return _rows(run, phase.data, phase.weights or (), phase, run.text.seed + number)

    return rows_of


def validation_rows_of_text(run: Run) -> ValidationRowsOf | None:
    """Rows of the text to validate on, if there is any; raises as what `rows_of_text` returns.

    They do not depend on the run's seed, so that losses of runs can be compared.
    """
    paths = run.held_out.validation_data
    return (lambda phase: _rows(run, paths, (), phase, seed=0)) if paths else None


def _rows(run: Run, paths: Sequence[str], weights: Sequence[float], phase: Phase, seed: int) -> Rows:
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
    shares = weights or [float(store.tokens) for store in stores]
    sources = [Source(store, weight) for store, weight in zip(stores, shares, strict=True)]
    return packed_rows(sources, phase.seq, seed)
