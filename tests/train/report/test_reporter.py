"""The reporter adds rates, feeds every output in process 0, and says clearly what is not installed."""

import importlib.machinery
import json
import math
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.report.test_console import LINE
from train.report.metrics_file import NAME, read_metrics
from train.report.reporter import Reporter
from train.report.throughput import Work

WORK = Work(products=6e9, attention=1e9, peak=1e15)


def record(step, seconds=10.0, **more):
    return {"step": step, "loss": 3.0, "tokens": 1_000_000, "seconds": seconds, "data_wait": 0.5, **more}


def test_rates(tmp_path, capsys):
    with Reporter(tmp_path / "run", 100, work=WORK) as reporter:
        reporter.start({"model": "tiny"})
        reporter.tick(1)
        reporter.step(record(10, seconds=100.0))
        reporter.step(record(20))
        reporter.work = None
        reporter.step(record(30, seconds=30.0, loss=jnp.float32(2.5), skipped=np.int32(1)))
        reporter.event("compiled", seconds=np.float32(1.5))
    first, second, third = read_metrics(tmp_path / "run").steps
    assert first["tokens_per_second"] == 1e4 and first["data_wait_share"] == 0.005
    assert math.isclose(first["mfu"], 0.07) and math.isclose(first["mfu_6n"], 0.06)
    assert math.isclose(second["mfu"], 0.7) and second["data_wait_share"] == 0.05
    assert third["mfu"] is None and third["mfu_6n"] is None and third["device_memory"] is None  # a CPU tells nothing
    assert third["loss"] == 2.5 and third["skipped"] == 1
    # The first interval, in which programs are loaded, is forgotten as soon as there is another.
    assert [r["eta"] for r in (first, second, third)] == [900.0, 80.0, 140.0]
    header, *lines, compiled = capsys.readouterr().out.splitlines()
    assert header == "model: tiny" and compiled == "event compiled seconds 1.5"
    assert len(lines) == 3 and all(LINE.fullmatch(line) for line in lines)
    assert "mfu 70.0% mfu_6n 60.0% data_wait 5.0% memory - skipped - eta 0:01:20" in lines[1]


def test_json(tmp_path, capsys):
    """Programs get, line by line, what the file gets."""
    with Reporter(tmp_path, 100, first_step=5, json=True) as reporter:
        reporter.start({"model": "tiny"})
        reporter.tick(6)
        reporter.step(record(10, loss=math.nan))
        reporter.event("checkpoint", step=10)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert [line.pop("time") > 0 for line in (*lines, *written)] == [True] * 6
    assert lines == written and lines[1]["loss"] is None
    assert lines[0] == {"event": "start", "step": 5, "facts": {"model": "tiny"}}


def test_little_is_known(tmp_path, capsys):
    with Reporter(tmp_path, 100, first_step=50, work=WORK) as reporter:
        reporter.step({"step": 60})
        reporter.step({"step": 70, "tokens": 5, "seconds": 0.0, "data_wait": 0.0})
        reporter.event("rollback", step=70, to=50)
        reporter.step(record(60))
    assert all(LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines() if line.startswith("step"))
    assert [r["step"] for r in read_metrics(tmp_path).steps] == [60]


def test_only_process_0_tells(tmp_path, capfd):
    folder = tmp_path / "run"
    with Reporter(folder, 100, work=WORK, tensorboard=True, process=1) as reporter:
        reporter.start({"model": "tiny"})
        reporter.tick(1)
        reporter.step(record(10))
        reporter.event("checkpoint", step=10)
    assert not folder.exists()
    assert capfd.readouterr() == ("", "")


def test_nothing_comes_after_the_end(tmp_path, capsys):
    reporter = Reporter(tmp_path, 100)
    reporter.close()
    reporter.step(record(1))
    reporter.close()
    assert (tmp_path / NAME).read_bytes() == b"" and capsys.readouterr().out == ""


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("module, flags", [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb": "project"})])
def test_missing_package(module, flags, process, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    extra = "tensorboard" if module == "tensorboardX" else "wandb"
    with pytest.raises(ValueError, match=rf"package {module}, .* pip install 'qwen2-jax\[{extra}\]'"):
        Reporter(tmp_path / "run", 100, process=process, **flags)
    assert not (tmp_path / "run").exists()


def read_events(path):
    """A TensorBoard file: records of length, checksum of it, data, checksum of that."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard(tmp_path, capfd):
    folder = tmp_path / "tensorboard"
    for first, steps in ((0, (10, 20)), (10, (20, 30))):
        with Reporter(tmp_path, 100, first_step=first, work=WORK, tensorboard=True) as reporter:
            reporter.start({"model": "tiny"})
            for step in steps:
                reporter.step(record(step, learning_rate=step / 10, gradient_norm=math.nan, **{"moe/unused": 0.25}))
            (path,) = folder.glob(f"*.from-{first}")
            assert read_events(path)[-1].step == steps[-1], "not flushed"
            reporter.event("checkpoint", step=steps[-1])
            reporter.event("rollback", step=steps[-1], to=5)
    assert capfd.readouterr().err == ""
    events = read_events(path)
    # TensorBoard drops what was written before of these steps and later ones.
    assert [event.step for event in events if event.session_log.status == 1] == [11, 6]
    values = [(value, event.step) for event in events for value in event.summary.value]
    scalars = {(value.tag, step): value.simple_value for value, step in values if not value.HasField("tensor")}
    assert scalars["learning_rate", 20] == 2.0 and scalars["learning_rate", 30] == 3.0
    assert math.isclose(scalars["mfu", 30], 0.7, rel_tol=1e-6)
    names = {"loss", "data_wait", "tokens_per_second", "mfu", "mfu_6n", "data_wait_share", "learning_rate"}
    assert math.isnan(scalars.pop(("gradient_norm", 20))) and math.isnan(scalars.pop(("gradient_norm", 30)))
    assert {tag for tag, _ in scalars} == names | {"moe/unused"}
    texts = {value.tag for value, _ in values if value.HasField("tensor")}
    assert texts == {f"{name}/text_summary" for name in ("run", "event/checkpoint", "event/rollback")}


class Wandb(types.ModuleType):
    """Stands in for the package, and notes what it is told."""

    class Error(Exception):
        pass

    def __init__(self, mode):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.config = types.SimpleNamespace(update=lambda facts, allow_val_change: self.calls.append(("config", facts)))
        self.mode, self.calls, self.refuse = mode, [], False

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def Settings(self, **options):
        return options

    def init(self, **options):
        if self.refuse:
            raise self.Error("No API key configured.")
        self.calls.append(("init", options))
        return self

    def define_metric(self, name, step_metric=None):
        self.calls.append(("metric", (name, step_metric)))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


@pytest.fixture(params=["online", "offline"])
def wandb(request, monkeypatch):
    stand_in = Wandb(request.param)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    sys.modules.pop("train.report.weights_and_biases", None)
    yield stand_in
    sys.modules.pop("train.report.weights_and_biases", None)


def test_weights_and_biases(wandb, tmp_path):
    folder = tmp_path / "my-run"
    for first in (0, 10):
        with pytest.raises(KeyError), Reporter(folder, 100, first_step=first, wandb="project") as reporter:
            reporter.start({"model": "tiny"})
            reporter.step(record(first + 10))
            reporter.event("checkpoint", step=first + 10, seconds=1.5, why="time")
            raise KeyError
    told = {name: [value for what, value in wandb.calls if what == name] for name, _ in wandb.calls}
    one, other = told["init"]
    assert one == other, "a run that goes on is the same run"
    assert one["project"] == "project" and one["name"] == "my-run" and one["dir"] == folder
    assert one["resume"] == ("allow" if wandb.mode == "online" else None)
    assert told["metric"] == [("step", None), ("*", "step")] * 2
    assert told["config"] == [{"model": "tiny"}] * 2
    assert told["finish"] == [1, 1], "an error is reported"
    first, event, _, _ = told["log"]
    assert first["step"] == 10 and first["loss"] == 3.0 and None not in first.values()
    assert event == {"step": 10, "event/checkpoint/step": 10, "event/checkpoint/seconds": 1.5}


def test_weights_and_biases_refuses(wandb, tmp_path):
    wandb.refuse = True
    with pytest.raises(ValueError, match="Weights & Biases: No API key configured."):
        Reporter(tmp_path, 100, wandb="project")
    with Reporter(tmp_path, 100) as reporter:
        reporter.step(record(10))
    assert json.loads((tmp_path / NAME).read_text())["step"] == 10
