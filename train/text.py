"""The data of pre-training: text of a run's options, tokenised, mixed and packed."""

import jax

from convert.files import expanded
from convert.progress import progress_bar
from train.data.encode import Encoding
from train.data.packing import Rows, packed_rows
from train.data.source import Source, open_store
from train.run import Phase, Run
from train.training import RowsOf, tokenizer_of

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
        paths, weights = phase.data or (), phase.weights or ()
        assert run.out is not None
        how = Encoding(str(tokenizer_of(run)), run.text.field)
        cache = run.text.cache or run.out / _TOKENS
        stores = []
        for path in paths:
            with progress_bar(f"tokenizing {path}", quiet=jax.process_index() != 0) as progress:
                stores.append(
                    open_store(
                        [path], how, expanded(cache), max_bad_records=run.text.max_bad_records, progress=progress
                    )
                )
        shares = weights or [float(store.tokens) for store in stores]
        sources = [Source(store, weight) for store, weight in zip(stores, shares, strict=True)]
        # A phase does not begin with the documents that the one before it began with.
        assert phase.seq is not None
        return packed_rows(sources, phase.seq, run.text.seed + number)

    return rows_of
