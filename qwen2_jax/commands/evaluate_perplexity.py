"""`qwen2-jax evaluate perplexity`: loss by position over a text."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
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
_WINDOWS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure how well a model predicts a text: by how many tokens it has read before, or with --stride all of it.

    Prints loss, perplexity and bits per token and byte. Writes FOLDER/perplexity.json (settings, every window, the
    tables) and FOLDER/perplexity.png (loss by position, one line for each mode).
    """

    evaluation: EvaluationOptions
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")]
    """Text files; they are read as one text."""
    length: int = 4096
    """Tokens of a window. They may be more than the model declares positions."""
    windows: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=f"(default: {_WINDOWS})")] = None
    """Parts of the text to measure; they do not overlap."""
    stride: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Measure the whole text, by windows N tokens apart; of each, tokens count that the one before did not reach."""
    bucket: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: a 16th of the length)")] = (
        None
    )
    """Positions that are averaged into one number."""
    prefill_chunk: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Read windows in pieces of N tokens, to bound the memory they take."""


def run(options: Options) -> int:
    options.evaluation.check()
    _check(options)
    text = read_texts(options.text)
    session = open_session(options.evaluation)

    from qwen2_jax.evaluation.perplexity import bucket_means, cut_windows, loss_by_position, slide_windows

    ids = session.tokenizer.encode(text, control_tokens=False)
    if options.stride is None:
        windows = cut_windows(ids, options.length, _WINDOWS if options.windows is None else options.windows)
        length = windows.shape[1]
        counted = np.full(len(windows), length - 1)
        bucket = -(-length // _BUCKETS) if options.bucket is None else options.bucket
    else:
        windows, counted = slide_windows(ids, options.length, options.stride)
        length = bucket = windows.shape[1]  # one mean of each window
    configs = {
        mode: reaching(session.config, long_context, length)
        for mode, long_context in options.evaluation.modes.long_contexts().items()
    }
    settings = {
        **shared_settings(options.evaluation, session),
        "text": [str(path) for path in options.text],
        "text_sha256": text_digest(text),
        "length": options.length,
        "stride": options.stride,
        "windows": len(windows),
        "bucket": bucket,
    }
    cells = list(itertools.product(configs, range(len(windows))))
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
                    means = [
                        bucket_means(of_window[None, len(of_window) - counted[window] :], bucket)[0].tolist()
                        for window, of_window in zip(batch, losses, strict=True)
                    ]
                    if not all(map(math.isfinite, itertools.chain.from_iterable(means))):
                        raise ValueError(f"the model's loss is not a number in mode {mode}, windows {batch}")
                    pairs = zip(batch, means, strict=True)
                    journal.append(*({"mode": mode, "window": window, "loss": loss} for window, loss in pairs))
                    update(len(batch), mode)
        of_cell = {(record["mode"], record["window"]): record for record in journal.records}
    bytes_counted = sum(
        sum(session.tokenizer.byte_counts(window[len(window) - count :].tolist()))
        for window, count in zip(windows, counted, strict=True)
    )
    _publish(options, session, settings, [of_cell[cell] for cell in cells], configs, counted, bytes_counted)
    return 0


def _check(options: Options) -> None:
    """
    Raises:
      ValueError: for options that contradict each other, before anything is read.
    """
    if not options.text:
        raise ValueError("--text names no file")
    for flag, number, least in (
        ("--length", options.length, 2),
        ("--windows", options.windows, 1),
        ("--prefill-chunk", options.prefill_chunk, 1),
    ):
        if number is not None and number < least:
            raise ValueError(f"{flag} must be at least {least}, got {number}")
    if options.bucket is not None and not 1 <= options.bucket < options.length:
        raise ValueError(f"--bucket must be from 1 to {options.length - 1}, less than the length, got {options.bucket}")
    if options.stride is None:
        return
    if not 1 <= options.stride < options.length:
        raise ValueError(f"--stride must be from 1 to {options.length - 1}, less than the length, got {options.stride}")
    for flag, number in (("--windows", options.windows), ("--bucket", options.bucket)):
        if number is not None:
            raise ValueError(f"{flag} means nothing with --stride, which measures the whole text; leave it out")


def _publish(
    options: Options,
    session: Session,
    settings: dict,
    records: list[dict],
    configs: dict,
    counted: np.ndarray,
    bytes_counted: int,
) -> None:
    from qwen2_jax.evaluation.perplexity import loss_table, place_table, total_loss
    from qwen2_jax.evaluation.plots import plot_perplexity

    means = {mode: np.asarray([record["loss"] for record in records if record["mode"] == mode]) for mode in configs}
    trained: int | None = None
    if options.stride is None:
        trained = options.evaluation.modes.trained(session.config)
        table = loss_table(means, settings["bucket"], options.length - 1)
    else:
        table = place_table({mode: of_windows[:, 0] for mode, of_windows in means.items()}, counted)
    tokens = int(counted.sum())
    totals = []
    for mode, of_windows in means.items():
        # How many tokens each mean is of: the last bucket of a window may be shorter.
        sizes = np.minimum(settings["bucket"], counted[:, None] - settings["bucket"] * np.arange(of_windows.shape[1]))
        totals.append({"mode": mode, **total_loss(float((of_windows * sizes).sum()), tokens, bytes_counted)})
    report = {
        "settings": settings,
        "trained_length": trained,
        "configurations": [describe(mode, options.length, config) for mode, config in configs.items()],
        "totals": totals,
        "table": table,
        "windows": records,
    }
    publish(NAME, options.evaluation, report, plot_perplexity, _summary(table, totals, options.stride))


def _summary(table: list[dict[str, Any]], totals: list[dict[str, Any]], stride: int | None) -> str:
    """Loss and perplexity by position, modes side by side; and in all."""
    lines = [["position", *(f"{total['mode']} {what}" for total in totals for what in ("loss", "ppl"))]]
    by_position: dict[tuple[int, int], list[str]] = {}
    for row in table:
        error = "" if row["loss_error"] is None else f" ±{row['loss_error']:.3f}"
        cells = by_position.setdefault((row["first"], row["last"]), [])
        cells += [f"{row['loss']:.3f}{error}", f"{row['perplexity']:.1f}"]
    lines += [[f"{first}-{last}", *cells] for (first, last), cells in by_position.items()]
    by_what = "by tokens read before" if stride is None else "by place in the text"
    wholes = [["in all", "tokens", "loss", "ppl", "bits per token", "bits per byte"]]
    for total in totals:
        loss = [f"{total['loss']:.3f}", f"{total['perplexity']:.1f}"]
        bits = [f"{total[name]:.4f}" for name in ("bits_per_token", "bits_per_byte")]
        wholes.append([total["mode"], str(total["tokens"]), *loss, *bits])
    return f"loss in nats per token, perplexity, {by_what}\n\n{aligned(lines)}\n\n{aligned(wholes)}"
