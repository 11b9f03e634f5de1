"""`qwen2-jax evaluate perplexity`: loss by position over a text."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen2_jax.commands.evaluation import (
    EvaluationOptions,
    aligned,
    describe,
    open_journal,
    open_session,
    publish,
    shared_settings,
    text_digest,
)
from qwen2_jax.commands.session import Session
from qwen2_jax.evaluation.modes import reaching
from qwen2_jax.evaluation.texts import read_texts
from qwen2_jax.progress import count_progress

NAME = "perplexity"

_BUCKETS = 16


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure how well a model predicts a text, by how many tokens it has read before.

    Writes FOLDER/perplexity.json (settings, every window, the table) and FOLDER/perplexity.png (loss by position, one
    line for each mode).
    """

    evaluation: EvaluationOptions
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")]
    """Text files; they are read as one text."""
    length: int = 4096
    """Tokens of a window. They may be more than the model declares positions."""
    windows: int = 8
    """Parts of the text to measure; they do not overlap."""
    bucket: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: a 16th of the length)")] = (
        None
    )
    """Positions that are averaged into one number."""
    prefill_chunk: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Read windows in pieces of N tokens, to bound the memory they take."""


def run(options: Options) -> int:
    options.evaluation.check()
    if not options.text:
        raise ValueError("--text names no file")
    for flag, number, least in (
        ("--length", options.length, 2),
        ("--windows", options.windows, 1),
        ("--prefill-chunk", options.prefill_chunk, 1),
    ):
        if number < least:
            raise ValueError(f"{flag} must be at least {least}, got {number}")
    bucket = -(-options.length // _BUCKETS) if options.bucket is None else options.bucket
    if not 1 <= bucket < options.length:
        raise ValueError(f"--bucket must be from 1 to {options.length - 1}, less than the length, got {bucket}")
    text = read_texts(options.text)
    session = open_session(options.evaluation)

    from qwen2_jax.evaluation.perplexity import bucket_means, cut_windows, loss_by_position

    windows = cut_windows(session.tokenizer.encode(text, control_tokens=False), options.length, options.windows)
    configs = {
        mode: reaching(session.config, long_context, options.length)
        for mode, long_context in options.evaluation.modes.long_contexts().items()
    }
    settings = {
        **shared_settings(options.evaluation, session),
        "text": [str(path) for path in options.text],
        "text_sha256": text_digest(text),
        "length": options.length,
        "windows": options.windows,
        "bucket": bucket,
    }
    cells = list(itertools.product(configs, range(options.windows)))
    with open_journal(NAME, options.evaluation, settings) as journal:
        done = {(record["mode"], record["window"]) for record in journal.records}
        left = [cell for cell in cells if cell not in done]
        with count_progress("windows", len(cells) - len(left), len(cells), quiet=options.evaluation.json) as update:
            for mode, group in itertools.groupby(left, lambda cell: cell[0]):
                alike, size = [window for _, window in group], options.evaluation.batch_size
                for first in range(0, len(alike), size):
                    batch = alike[first : first + size]
                    losses = loss_by_position(
                        *(configs[mode], session.params, windows[batch]),
                        piece=options.prefill_chunk,
                        options=session.layer_options,
                    )
                    means = bucket_means(losses, bucket).tolist()
                    if not all(map(math.isfinite, itertools.chain.from_iterable(means))):
                        raise ValueError(f"the model's loss is not a number in mode {mode}, windows {batch}")
                    pairs = zip(batch, means, strict=True)
                    journal.append(*({"mode": mode, "window": window, "loss": loss} for window, loss in pairs))
                    update(len(batch), mode)
        of_cell = {(record["mode"], record["window"]): record for record in journal.records}
    _publish(options, session, settings, [of_cell[cell] for cell in cells], configs)
    return 0


def _publish(options: Options, session: Session, settings: dict, records: list[dict], configs: dict) -> None:
    import numpy as np

    from qwen2_jax.evaluation.perplexity import loss_table
    from qwen2_jax.evaluation.plots import plot_perplexity

    means = {mode: np.asarray([record["loss"] for record in records if record["mode"] == mode]) for mode in configs}
    table = loss_table(means, settings["bucket"], options.length - 1)
    report = {
        "settings": settings,
        "trained_length": options.evaluation.modes.trained(session.config),
        "configurations": [describe(mode, options.length, config) for mode, config in configs.items()],
        "table": table,
        "windows": records,
    }
    publish(NAME, options.evaluation, report, plot_perplexity, _summary(table, list(configs)))


def _summary(table: list[dict[str, Any]], modes: list[str]) -> str:
    """Loss and perplexity by position, modes side by side."""
    lines = [["position", *(f"{mode} {what}" for mode in modes for what in ("loss", "ppl"))]]
    by_position: dict[tuple[int, int], list[str]] = {}
    for row in table:
        error = "" if row["loss_error"] is None else f" ±{row['loss_error']:.3f}"
        cells = by_position.setdefault((row["first"], row["last"]), [])
        cells += [f"{row['loss']:.3f}{error}", f"{row['perplexity']:.1f}"]
    lines += [[f"{first}-{last}", *cells] for (first, last), cells in by_position.items()]
    return f"loss in nats per token, perplexity, by tokens read before\n\n{aligned(lines)}"
