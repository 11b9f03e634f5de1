"""`qwen2-jax train plot`: curves of runs, from their metrics.jsonl; fit for colour-blind readers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tyro.conf import Positional, arg

from qwen2_jax.pictures import COLORS, save_picture
from train.report.metrics_file import History, read_metrics

_PANELS = {
    "loss": "loss, nats per token",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}
_MARKS = {"checkpoint": ("|", "checkpoint"), "skip": ("x", "step skipped"), "rollback": ("<", "rolled back")}
"""Events that are marked at the foot of the loss, each with its marker and its name in the legend."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw loss, gradient norm, learning rate and tokens per second of runs over their steps.

    Steps that a run took twice, because it died or rolled back, count once. Checkpoints, skipped steps and rollbacks
    are marked at the foot of the loss.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...", help_behavior_hint="(one or more)")]
    """Folders of runs, finished or not."""
    out: Annotated[Path, arg(metavar="PNG")]
    """Picture to write."""
    smooth: Annotated[int, arg(metavar="N")] = 1
    """Draw loss, gradient norm and tokens per second as the mean over so many intervals, faintly beside each one's."""
    json: bool = False
    """Print what was drawn as JSON."""


def run(options: Plot) -> int:
    """Does what `qwen2-jax train plot` was asked to.

    Raises:
      OSError: if a run cannot be read, or the picture not written.
      ValueError: for what is no run, a run without metrics, a file that is damaged, or no place for a picture.
    """
    if options.smooth < 1:
        raise ValueError(f"--smooth is a number of intervals, 1 or more; got {options.smooth}")
    if not options.runs:
        raise ValueError("no run to plot; give the folder of one or more")
    if options.out.is_dir() or not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out is a picture to write, in a folder that is there; got {options.out}")
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out is a PNG, the only kind of picture that is drawn; name it .png, got {options.out}")
    histories = [read_metrics(folder) for folder in options.runs]
    for folder, history in zip(options.runs, histories, strict=True):
        if not history.steps:
            raise ValueError(f"{folder} has not come to its first interval: nothing to plot yet")
    save_picture(draw(dict(zip(_names(options.runs), histories, strict=True)), options.smooth), options.out)
    drawn = [
        {"run": str(folder), "intervals": len(history.steps), "step": history.steps[-1]["step"]}
        for folder, history in zip(options.runs, histories, strict=True)
    ]
    if options.json:
        print(json.dumps({"out": str(options.out), "runs": drawn}))
        return 0
    for one in drawn:
        print(f"{one['run']}: {one['intervals']} intervals, to step {one['step']}")
    print(f"{options.out} is drawn")
    return 0


def draw(runs: dict[str, History], smooth: int = 1) -> Figure:
    """Four panels with a curve for each run, 1500 by 1050 pixels when saved at 150 dpi.

    Args:
      runs: by the name in the legend.
      smooth: intervals to take the mean of.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = dict(zip(_PANELS, figure.subplots(2, 2, sharex=True).ravel(), strict=True))
    for number, (name, history) in enumerate(runs.items()):
        color = COLORS[number % len(COLORS)]
        name = name.replace("$", r"\$")  # or matplotlib reads mathematics
        steps = np.asarray([record["step"] for record in history.steps])
        for key, panel in panels.items():
            # A learning rate has no noise, and its corners are meant.
            _curve(panel, steps, _values(history.steps, key), color, name, 1 if key == "learning_rate" else smooth)
        held_out = _values(history.steps, "validation_loss")
        known = np.isfinite(held_out)
        if known.any():
            of_run = f"{name}, validation"
            panels["loss"].plot(steps[known], held_out[known], color=color, linestyle="--", marker=".", label=of_run)
        _mark_events(panels["loss"], history.events, color)
    for key, panel in panels.items():
        panel.set(title=_PANELS[key], xlabel="step")
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    norms = panels["gradient_norm"]
    if all(np.nanmin(line.get_ydata(), initial=np.inf) > 0 for line in norms.lines):
        norms.set_yscale("log")  # it spikes
    for key in ("learning_rate", "tokens_per_second"):
        panels[key].set_ylim(bottom=0)
        panels[key].ticklabel_format(axis="y", scilimits=(-2, 5))
    if len(panels["loss"].get_legend_handles_labels()[1]) > 1:
        panels["loss"].legend()
    return figure


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of `width` values around each one, of fewer at the ends; NaNs do not count, but stay.

    Args:
      values: [N] float64.
      width: 1 or more.
    """
    width = min(width, 2 * len(values))  # a wider one has nothing more to count
    known = ~np.isnan(values)
    kernel = np.ones(width)
    before = width // 2
    total, count = (
        np.convolve(np.pad(array, (before, width - 1 - before)), kernel, mode="valid")
        for array in (np.where(known, values, 0.0), known.astype(np.float64))
    )
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


def _curve(panel: Axes, steps: np.ndarray, values: np.ndarray, color: str, name: str, smooth: int) -> None:
    if np.isnan(values).all():
        return
    # A lone point has no line.
    marker = "o" if np.isfinite(values).sum() == 1 else None
    if smooth > 1:
        panel.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
    panel.plot(steps, smoothed(values, smooth), color=color, linewidth=1.4, marker=marker, label=name)


def _mark_events(panel: Axes, events: Sequence[dict[str, Any]], color: str) -> None:
    shown = {text for text in panel.get_legend_handles_labels()[1]}
    for name, (marker, text) in _MARKS.items():
        steps = [event["step"] for event in events if event["event"] == name and isinstance(event.get("step"), int)]
        if steps:
            label = None if text in shown else text
            foot = panel.get_xaxis_transform()
            panel.scatter(
                steps, [0.03] * len(steps), s=24, marker=marker, color=color, alpha=0.6, transform=foot, label=label
            )


def _values(records: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """[N] float64, NaN where a record has no such number."""
    values = (record.get(name) for record in records)
    return np.asarray([value if isinstance(value, int | float) else np.nan for value in values], np.float64)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two would have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
