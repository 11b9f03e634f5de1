"""metrics.jsonl is valid wherever a run was killed, and a run that goes on leaves one clean curve."""

import errno
import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.report.metrics_file import NAME, MetricsFile, read_metrics


def write(folder, first, steps, events=(), start=True):
    """One process' part of a run: `steps` in order, each event (step it comes after, name, fields)."""
    output = MetricsFile(folder, first)
    if start:
        output.start({"model": "tiny"})
    for step in steps:
        output.step({"step": step, "loss": first + step / 1000})
        for after, name, fields in events:
            if after == step:
                output.event(name, fields)
    output.close()


def steps_and_losses(folder):
    return [(record["step"], record["loss"]) for record in read_metrics(folder).steps]


def test_every_line_is_json(tmp_path):
    output = MetricsFile(tmp_path, 0)
    output.start({"model": "tiny \x1b\u2028"})
    output.step({"step": 1, "loss": math.nan, "norm": math.inf, "rate": 1e-5, "memory": None, "tokens": 2**40})
    output.event("skip", {"step": 1, "loss": -math.inf, "why": "not\nfinite", "path": tmp_path})
    output.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    start, step, event = (json.loads(s, parse_constant=refuse) for s in (tmp_path / NAME).read_text().splitlines())
    assert step == {"step": 1, "loss": None, "norm": None, "rate": 1e-5, "memory": None, "tokens": 2**40}
    assert abs(start.pop("time") - time.time()) < 60 and abs(event.pop("time") - time.time()) < 60
    assert start == {"event": "start", "step": 0, "facts": {"model": "tiny \x1b\u2028"}}
    assert event == {"event": "skip", "step": 1, "loss": None, "why": "not\nfinite", "path": str(tmp_path)}
    assert read_metrics(tmp_path).steps == [step]


def test_a_run_that_goes_on_supersedes_what_died(tmp_path):
    write(tmp_path, 0, [10, 20, 30, 40], events=[(20, "checkpoint", {"step": 20}), (40, "skip", {"step": 38})])
    write(tmp_path, 20, [30, 40, 50], events=[(40, "checkpoint", {"step": 40})])
    assert steps_and_losses(tmp_path) == [(10, 0.01), (20, 0.02), (30, 20.03), (40, 20.04), (50, 20.05)]
    assert [(event["event"], event["step"]) for event in read_metrics(tmp_path).events] == [
        ("start", 0),
        ("checkpoint", 20),
        ("start", 20),
        ("checkpoint", 40),
    ]
    write(tmp_path, 50, [])  # was complete: nothing is lost
    assert len(read_metrics(tmp_path).steps) == 5
    write(tmp_path, 40, [])  # went back, and died at once
    assert [step for step, _ in steps_and_losses(tmp_path)] == [10, 20, 30, 40]
    write(tmp_path, 0, [10])  # begun anew
    assert steps_and_losses(tmp_path) == [(10, 0.01)]
    assert (tmp_path / NAME).read_text().count("\n") == 16, "nothing was taken out of the file"


def test_a_rollback_supersedes_the_steps_that_it_undoes(tmp_path):
    events = [(20, "checkpoint", {"step": 20}), (40, "skip", {"step": 39}), (40, "rollback", {"step": 40, "to": 20})]
    write(tmp_path, 0, [10, 20, 30, 40], events)
    write(tmp_path, 0, [30, 40], start=False)
    assert [step for step, _ in steps_and_losses(tmp_path)] == [10, 20, 30, 40]
    assert [event["event"] for event in read_metrics(tmp_path).events] == ["start", "checkpoint", "rollback"]


def test_steps_that_come_again_without_a_word_count_once(tmp_path):
    write(tmp_path, 0, [10, 20, 30], start=False)
    write(tmp_path, 15, [20, 25], start=False)
    assert steps_and_losses(tmp_path) == [(10, 0.01), (20, 15.02), (25, 15.025)]


def test_torn_anywhere(tmp_path):
    write(tmp_path, 0, [10, 20])
    whole = (tmp_path / NAME).read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        (tmp_path / NAME).write_bytes(whole[:cut])
        assert [step for step, _ in steps_and_losses(tmp_path)] == [10], cut
        write(tmp_path, 10, [20])
        assert steps_and_losses(tmp_path) == [(10, 0.01), (20, 10.02)], cut
        assert all(json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()), cut


WRITER = """
import sys
from pathlib import Path
from train.report.metrics_file import MetricsFile
output = MetricsFile(Path(sys.argv[1]), 0)
output.start({})
for step in range(1, 10**9):
    output.step({"step": step, "loss": 1 / step})
    print(step, flush=True)
"""


def test_killed_while_it_writes(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        while process.stdout.readline() != "50\n":
            pass
        process.send_signal(signal.SIGKILL)
        said = [50, *map(int, process.stdout.read().split("\n")[:-1])]
    steps = [record["step"] for record in read_metrics(tmp_path).steps]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= said[-1], "a record was lost that had been reported"


def test_a_full_disk_leaves_no_half_line(tmp_path):
    output = MetricsFile(tmp_path, 0)
    output.step({"step": 1, "loss": 1.0})
    size = (tmp_path / NAME).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            output.step({"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / NAME)
    output.step({"step": 3, "loss": 1.0})
    output.close()
    assert steps_and_losses(tmp_path) == [(1, 1.0), (3, 1.0)]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'{"step": 1}\nrubbish\n', "metrics.jsonl, line 2 is not JSON"),
        (b'{"step": 1, "step": 2}\n', "line 1 .*given twice"),
        (b"[1]\n", "line 1: expected an object, got"),
        (b'{"loss": 1}\n', "line 1: a step must be a whole number, got None"),
        (b'{"step": 1.5}\n', "line 1: a step must be a whole number, got 1.5"),
        (b'{"event": "skip", "step": "x"}\n', "line 1: a step must be a whole number, got 'x'"),
        (b"\xff\n", "line 1 is not JSON"),
    ],
)
def test_damaged(content, complaint, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_metrics(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder of a run"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"has no {NAME}: it is no run, or one that has not"):
        read_metrics(tmp_path)
