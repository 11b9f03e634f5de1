"""A run of several processes sees the batches of a run of one, and is stopped by a signal to whichever of them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import free_address
from tests.train.runs import OPTIONS, curves, events
from tests.xla import QUICK_ENVIRONMENT

SCRIPT = Path(__file__).parent / "run_two_processes.py"


def start(folder, model, processes, *more, what="SIGTERM", at=0, whom=0):
    """Runs to the end; what each process printed, and its exit status.

    Args:
      more: flags.
      what: befalls the process `whom` at the step `at`.
    """
    address = free_address()
    environment = {
        **os.environ,
        **QUICK_ENVIRONMENT,
        "JAX_NUM_CPU_DEVICES": str(8 // processes),
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    flags = ["--out", folder, "--model", model, "--tokenizer", model, *OPTIONS, "--log-every", 1, *more]
    runs = []
    for process in range(processes):
        join = ["--coordinator", address, "--processes", processes, "--process", process] if processes > 1 else []
        command = [sys.executable, SCRIPT, what, at if process == whom else 0, *flags, *join]
        runs.append(
            subprocess.Popen(
                [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    ended = [(*run.communicate(timeout=600), run.returncode) for run in runs]
    return ended


def batches(out):
    """By step, those that were taken after all."""
    return {int(step): digest for step, digest in re.findall(r"^batch (\d+) (\w+)$", out, re.MULTILINE)}


def same_losses(folder, other):
    ours, theirs = curves(folder), curves(other)
    assert ours.keys() == theirs.keys() == set(range(1, 13))
    for step in ours:
        np.testing.assert_allclose(ours[step]["loss"], theirs[step]["loss"], rtol=1e-6)


@pytest.mark.slow
def test_processes(model, tmp_path):
    """maxtext#2824: weights were resumed, and the data began anew. That it goes on is seen by the batches' contents."""
    one = start(tmp_path / "one", model, 1)
    assert one[0][2] == 0, one[0][1][-2000:]
    expected = batches(one[0][0])
    assert len(set(expected.values())) == 12

    stopped = start(tmp_path / "two", model, 2, at=6, whom=1)
    assert [status for *_, status in stopped] == [75, 75], stopped[0][1][-2000:] + stopped[1][1][-2000:]
    taken = [batches(out) for out, *_ in stopped]
    last = max(taken[0])
    assert taken[0] == taken[1] == {step: expected[step] for step in range(1, last + 1)}
    assert 6 <= last <= 9  # JAX lets the processes agree on a step, one of the next few
    assert [event["step"] for event in events(tmp_path / "two", "stopped")] == [last]
    saves = [event["step"] for event in events(tmp_path / "two", "checkpoint")]
    assert saves == sorted({0, 4, *([8] if last >= 8 else []), last})

    ((out, errors, status),) = start(tmp_path / "two", model, 1)
    assert status == 0, errors[-2000:]
    assert batches(out) == {step: expected[step] for step in range(last + 1, 13)}
    same_losses(tmp_path / "two", tmp_path / "one")

    four = start(tmp_path / "four", model, 4)
    assert [status for *_, status in four] == [0] * 4, four[0][1][-2000:]
    assert all(batches(out) == expected for out, *_ in four)
    same_losses(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("whom", [0, 1])
def test_control_c_reaches_all(whom, model, tmp_path):
    stopped = start(tmp_path / "run", model, 2, what="SIGINT", at=6, whom=whom)
    assert [status for *_, status in stopped] == [75, 75], stopped[0][1][-2000:] + stopped[1][1][-2000:]
    last = max(batches(stopped[0][0]))
    assert batches(stopped[1][0]).keys() == set(range(1, last + 1)) and 6 <= last <= 9
    assert [event["step"] for event in events(tmp_path / "run", "stopped")] == [last]


@pytest.mark.slow
def test_another_process_cannot_write(model, tmp_path):
    """keras#23609, where it is not the process that reports: no process ends as if all were well, and no step is there
    that is not whole."""
    ended = start(tmp_path / "run", model, 2, what="full", at=6, whom=1)
    assert [status for *_, status in ended][1] == 2 and ended[0][2] not in (0, 75), ended[0][1][-2000:]
    assert "qwen2-jax: error: step 8 could not be saved in" in ended[1][1]
    assert max(batches(ended[1][0])) <= 12
    whole = [path.name for path in (tmp_path / "run/checkpoints").iterdir() if (path / "manifest.json").exists()]
    assert sorted(whole) == ["00000000", "00000004"]
    again = start(tmp_path / "run", model, 2)
    assert [status for *_, status in again] == [0, 0], again[0][1][-2000:] + again[1][1][-2000:]
    assert min(batches(again[0][0])) == 5


@pytest.mark.slow
def test_processes_share_the_tokens_of_their_text(model, tmp_path):
    """Both come upon text that is not tokenized yet: one of them makes the tokens, and both read the same."""
    (tmp_path / "prose").mkdir()
    for page in sorted((SCRIPT.parents[2] / "docs").glob("*.md")):
        shutil.copy(page, tmp_path / "prose")
    with (tmp_path / "code.jsonl").open("w") as file:
        for module in sorted((SCRIPT.parents[2] / "train").glob("*.py")):
            file.write(json.dumps({"text": module.read_text()}) + "\n")
    flags = ("--data", tmp_path / "prose", tmp_path / "code.jsonl", "--weights", 2, 1)

    ((out, errors, status),) = start(tmp_path / "one", model, 1, *flags)
    assert status == 0, errors[-2000:]
    expected = batches(out)
    assert len(set(expected.values())) == 12

    stopped = start(tmp_path / "two", model, 2, *flags, at=6, whom=0)
    assert [status for *_, status in stopped] == [75, 75], stopped[0][1][-2000:] + stopped[1][1][-2000:]
    taken = [batches(out) for out, *_ in stopped]
    last = max(taken[0])
    assert taken[0] == taken[1] == {step: expected[step] for step in range(1, last + 1)}
    stores = [sorted(path.name for path in (tmp_path / name / "tokens").iterdir()) for name in ("one", "two")]
    assert stores[0] == stores[1] and len(stores[0]) == 2  # nothing unfinished, nothing made twice

    ((out, errors, status),) = start(tmp_path / "two", model, 1, *flags)
    assert status == 0, errors[-2000:]
    assert batches(out) == {step: expected[step] for step in range(last + 1, 13)}
    same_losses(tmp_path / "two", tmp_path / "one")
