"""The picture shows what counts of each run, at the size it should have; what cannot be drawn is one clear line."""

import json
import struct

import numpy as np
import pytest

from train.plot import Plot, draw, run, smoothed
from train.report.metrics_file import NAME, History, MetricsFile, read_metrics


def make_run(folder, parts, events=()):
    """A run in parts, each (step it goes on from, its steps)."""
    folder.mkdir()
    for first, steps in parts:
        output = MetricsFile(folder, first)
        output.start({})
        for step in steps:
            values = {"loss": 10 / step + first, "gradient_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 1e5}
            output.step({"step": step, **values})
        for name, fields in events:
            output.event(name, fields)
        output.close()
    return folder


def curves(figure):
    """By title of the panel: the (x, y) of its lines."""
    return {panel.get_title(): [line.get_xydata().T.tolist() for line in panel.lines] for panel in figure.axes}


def test_curves(tmp_path):
    one = make_run(tmp_path / "one", [(0, [10, 20, 30]), (20, [30, 40])])
    other = make_run(tmp_path / "other", [(0, [5])])
    figure = draw({"one": read_metrics(one), "other": read_metrics(other)})
    shown = curves(figure)
    assert list(shown) == ["loss, nats per token", "gradient norm", "learning rate", "tokens per second"]
    first, second = shown["loss, nats per token"]
    assert first == [[10, 20, 30, 40], [1.0, 0.5, 20 + 1 / 3, 20.25]]  # step 30 is the second process'
    assert second == [[5], [2.0]]
    assert shown["learning rate"][0] == [[10, 20, 30, 40], [1e-4] * 4]
    loss = figure.axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["one", "other"]
    assert loss.lines[0].get_color() != loss.lines[1].get_color()
    assert loss.lines[1].get_marker() == "o", "a lone point has no line"


def test_events(tmp_path):
    events = [
        ("compiled", {"seconds": 3.0}),
        ("checkpoint", {"step": 10}),
        ("checkpoint", {"step": 20}),
        ("skip", {"step": 15}),
        ("rollback", {"step": 30, "to": 20}),
    ]
    history = read_metrics(make_run(tmp_path / "run", [(0, [10, 20, 30])], events))
    figure = draw({"run": history, "same": history})
    marks = figure.axes[0].collections
    assert [mark.get_offsets()[:, 0].tolist() for mark in marks] == [[10, 20], [15], [30]] * 2
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(texts) == sorted(["run", "same", "checkpoint", "step skipped", "rolled back"])


def test_gaps():
    steps = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 4.0, "gradient_norm": 0.0}]
    figure = draw({"run": History(steps, [])}, smooth=3)
    faint, line = figure.axes[0].lines
    assert np.array_equal(faint.get_ydata(), [2, np.nan, 4], equal_nan=True)
    assert np.array_equal(line.get_ydata(), [2, np.nan, 4], equal_nan=True)
    assert figure.axes[1].get_yscale() == "linear", "a norm of 0 has no logarithm"
    assert not figure.axes[2].lines, "there was no learning rate"


def test_validation():
    steps = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}, {"step": 3, "loss": 0.5}]
    figure = draw({"run": History(steps, [])})
    _, held_out = figure.axes[0].lines
    assert held_out.get_xydata().tolist() == [[2, 1.5]] and held_out.get_label() == "run, validation"
    assert figure.axes[0].get_legend() is not None


def test_smoothing():
    values = np.asarray([1.0, 2.0, 6.0, np.nan, 10.0])
    assert np.array_equal(smoothed(values, 1), values, equal_nan=True)
    assert np.array_equal(smoothed(values, 3), [1.5, 3.0, 4.0, np.nan, 10.0], equal_nan=True)
    assert np.allclose(smoothed(np.ones(7), 4), 1.0)
    assert np.allclose(smoothed(np.arange(3.0), 99), 1.0)


def test_picture(tmp_path, capsys):
    runs = tuple(make_run(tmp_path / name, [(0, [10, 20])], [("checkpoint", {"step": 20})]) for name in ("a", "$b$^"))
    out = tmp_path / "picture.png"
    assert run(Plot(runs, out, smooth=2)) == 0
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", data[16:24]) == (1500, 1050)
    said = [f"{runs[0]}: 2 intervals, to step 20", f"{runs[1]}: 2 intervals, to step 20", f"{out} is drawn"]
    assert capsys.readouterr().out.splitlines() == said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["$b$^", "a", "picture.png"]
    assert run(Plot(runs, out, json=True)) == 0
    told = [{"run": str(folder), "intervals": 2, "step": 20} for folder in runs]
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "runs": told}


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        make_run(tmp_path / name / "run", [(0, [1])])
    seen = []
    monkeypatch.setattr("train.plot.draw", lambda runs, smooth: seen.extend(runs) or draw(runs, smooth))
    folders = tmp_path / "a" / "run", tmp_path / "b" / "run"
    run(Plot(folders, tmp_path / "out.png"))
    assert seen == [str(folder) for folder in folders]


def test_no_other_kind_of_picture_is_promised(tmp_path):
    folder = make_run(tmp_path / "good", [(0, [1])])
    with pytest.raises(ValueError, match="--out is a PNG, .* name it .png, got .*loss.svg"):
        run(Plot((folder,), tmp_path / "loss.svg"))
    assert run(Plot((folder,), tmp_path / "loss.PNG")) == 0


def test_what_cannot_be_drawn(tmp_path):
    good, out = make_run(tmp_path / "good", [(0, [1])]), tmp_path / "out.png"
    early, bad, empty = make_run(tmp_path / "early", [(0, [])]), tmp_path / "bad", tmp_path / "empty"
    bad.mkdir()
    (bad / NAME).write_text('{"step": 1}\n{"step"\n')
    empty.mkdir()
    for folders, complaint in [
        ((), "no run to plot"),
        ((good, tmp_path / "none"), "none is no folder of a run"),
        ((good, empty), "empty has no metrics.jsonl"),
        ((early,), "early has not come to its first interval"),
        ((bad,), "bad/metrics.jsonl, line 2 is not JSON"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            run(Plot(folders, out))
    with pytest.raises(ValueError, match="--smooth is a number of intervals, 1 or more; got 0"):
        run(Plot((good,), out, smooth=0))
    for place in (tmp_path / "nowhere" / "out.png", tmp_path):
        with pytest.raises(ValueError, match="--out is a picture to write, in a folder that is there; got"):
            run(Plot((good,), place))
    assert not out.exists()
