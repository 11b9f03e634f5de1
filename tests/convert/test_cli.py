"""The command line around the converter."""

import json
import subprocess
import sys

import numpy as np
import pytest


def test_json_report(make_hf, run, tmp_path):
    status, out, error = run("from-hf", make_hf("tied"), tmp_path / "ours", "--json", "--dtype", "float32")
    report = json.loads(out)
    assert (status, error) == (0, "")
    assert (report["destination"], report["bytes"], report["warnings"]) == (str(tmp_path / "ours"), 74_880, [])


def test_sentence_and_repetition(make_hf, run, tmp_path, snapshot):
    folder = make_hf("dense")
    assert "21,792 parameters in 27 arrays" in run("from-hf", folder, tmp_path / "ours")[1]
    before = snapshot(tmp_path)
    status, out, _ = run("from-hf", folder, tmp_path / "ours")
    assert (status, "is complete already; nothing to do" in out) == (0, True)
    assert "is complete already" not in run("from-hf", folder, tmp_path / "ours", "--overwrite")[1]
    assert snapshot(tmp_path) == before
    status, _, error = run("from-hf", folder, tmp_path / "ours", "--dtype", "float32")
    assert (status, "exists already" in error) == (2, True)


def test_warning_goes_to_standard_error(make_hf, tools, run, tmp_path):
    tensors = tools.random_tensors(tools.configs["dense"], "float32")
    tensors["model.norm.weight"][1] = np.nan
    status, out, error = run("from-hf", make_hf("dense", tensors=tensors), tmp_path / "ours")
    assert status == 0
    assert error.startswith("qwen2-jax: warning: 1 weights are NaN or infinite")
    assert "warning:" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from-hf", "a", "b", "--max-host-memory", "lots"], "'lots' is not a size"),
        (["from-hf", "a", "b", "--max-host-memory", "9" * 400], "999...' is not a size"),
        (["from-hf", "a", "b", "--max-host-memory", "1MB"], "--max-host-memory 1MB is too little for this conversion"),
        (["from-hf", "a"], "DST"),
        (["from-hf", "a", "b", "--dtype", "int4"], "int4"),
        (["sideways", "a", "b"], "sideways"),
    ],
)
def test_usage_errors(arguments, message, make_hf, run, tmp_path, monkeypatch):
    make_hf("dense", name="a")
    monkeypatch.chdir(tmp_path)
    status, _, error = run(*arguments)
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("job", [[], ["from-hf"], ["to-hf"], ["upcycle"], ["verify"]])
def test_help(job, capsys):
    from convert.cli import main

    with pytest.raises(SystemExit) as stop:
        main([*job, "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "usage: qwen2-jax convert" in text
    assert not any(internal in text for internal in ("None", "STR", "FLOAT", "PATH"))


def test_progress_lines(make_hf, run, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen2_jax.progress._SECONDS_BETWEEN_LINES", 0.0)
    _, _, error = run("from-hf", make_hf("dense"), tmp_path / "ours")
    assert error.count("converting: 0.00 of 0.00 GB, ") == 27


def test_as_a_module(make_hf, tmp_path):
    command = [sys.executable, "-m", "convert", "from-hf", make_hf("dense"), tmp_path / "ours"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "27 arrays" in done.stdout
