"""Evaluations as pictures, from the plain dictionaries that their JSON files hold; fit for colour-blind readers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qwen2_jax.pictures import COLORS, save_picture

_MARKERS = "osD^vP"


def plot_needle(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a PNG: scores by length and depth, one panel for each mode.

    Args:
      report: with "table" (the rows of `qwen2_jax.evaluation.needle.score_table`), and if known "settings" (its "task"
        and "model" become the title) and "trained_length" (marked where lengths pass it).
      path: of the picture.

    Raises:
      OSError: if it cannot be written.
    """
    table = report["table"]
    modes, lengths, depths = (_values(table, name) for name in ("mode", "length", "depth"))
    columns = len(modes) if len(modes) <= 3 else -(-len(modes) // 2)
    rows = -(-len(modes) // columns)
    width, height = 1.4 + 0.62 * len(lengths), 1.5 + 0.45 * len(depths)
    figure = Figure(figsize=(columns * max(width, 2.6) + 1.4, rows * max(height, 2.4) + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    trained = report.get("trained_length")
    for panel in panels.ravel()[len(modes) :]:
        panel.set_visible(False)
    for panel, mode in zip(panels.ravel(), modes, strict=False):
        scores = np.full((len(depths), len(lengths)), np.nan)
        for row in table:
            if row["mode"] == mode:
                scores[depths.index(row["depth"]), lengths.index(row["length"])] = row["score"]
        image = panel.imshow(scores, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(scores):
            if not np.isnan(value):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5 else "white")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
        panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        panel.set(title=mode, xlabel="prompt, tokens", ylabel="depth (0 first, 1 last)")
        within = sum(length <= trained for length in lengths) if trained else 0
        if 0 < within < len(lengths):
            panel.axvline(within - 0.5, color=COLORS[1], linestyle="--", linewidth=2)
    figure.colorbar(image, ax=panels, label="share of secrets found")
    title = _title(report, "task")
    if trained and lengths[0] <= trained < lengths[-1]:
        title += f"  (dashed: trained on {trained:,} tokens)"
    figure.suptitle(title)
    save_picture(figure, path)


def plot_perplexity(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a PNG: loss by position, one line for each mode, with a band of one standard error to each side.

    Args:
      report: with "table" (the rows of `qwen2_jax.evaluation.perplexity.loss_table`), and if known "settings" (its
        "model" becomes the title) and "trained_length" (a vertical line, if windows are that long).
      path: of the picture.

    Raises:
      OSError: if it cannot be written.
    """
    table = report["table"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, mode in enumerate(_values(table, "mode")):
        rows = [row for row in table if row["mode"] == mode]
        middle = np.asarray([(row["first"] + row["last"]) / 2 for row in rows])
        loss = np.asarray([row["loss"] for row in rows])
        error = np.asarray([row["loss_error"] or 0.0 for row in rows])
        color, marker = COLORS[number % len(COLORS)], _MARKERS[number % len(_MARKERS)]
        axes.plot(middle, loss, color=color, marker=marker, markersize=4, label=mode)
        axes.fill_between(middle, loss - error, loss + error, color=color, alpha=0.2, linewidth=0)
    trained = report.get("trained_length")
    if trained and trained <= max(row["last"] for row in table):
        axes.axvline(trained, color="black", linestyle="--", linewidth=1, label=f"trained length, {trained:,}")
    axes.set(xlabel="position, tokens", ylabel="loss, nats per token", title=_title(report, "loss by position"))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)


def _values(table: list[Mapping[str, Any]], name: str) -> list[Any]:
    """The values of a column, each once: numbers in order, words in the order in which they first come."""
    values = list(dict.fromkeys(row[name] for row in table))
    return values if any(isinstance(value, str) for value in values) else sorted(values)


def _title(report: Mapping[str, Any], what: str) -> str:
    settings = report.get("settings", {})
    model = Path(settings["model"]).name if "model" in settings else ""
    return ": ".join(filter(None, (model, str(settings.get(what, "") or what))))
