"""`qwen2-jax evaluate lm-eval` as a user meets it: a table, the harness's files, going on, one line for mistakes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_jax.plugins.lm_eval import Qwen2JaxLM
from tests.oracles.harness import write_tasks

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", autouse=True)
def data_sets_stay_here(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # for commands of their own
        yield


def named(tasks, *names):
    return ",".join(str(tasks / f"{name}.yaml") for name in names)


@pytest.fixture
def command(model, tasks):
    return ["lm-eval", "--model", model, "--batch-size", 4, "--tasks"]


def test_prints_a_table(run, command, tasks):
    code, out, err = run(*command, named(tasks, "letters", "stops"), "--limit", 4)
    assert code == 0, err
    assert re.search(r"\|qwen2_jax_test_letters\|.*\|acc ", out)
    assert re.search(r"scored tokens/s, .* new tokens/s, .* s of compilation in \d+ programs, \d+% padding", out)


def test_writes_what_the_harness_writes(run, command, tasks, tmp_path):
    code, out, err = run(*command, named(tasks, "letters"), "--out", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out)["results"]["qwen2_jax_test_letters"]["acc,none"] >= 0
    (results,) = tmp_path.rglob("results_*.json")
    report = json.loads(results.read_text())
    assert report["results"]["qwen2_jax_test_letters"] == json.loads(out)["results"]["qwen2_jax_test_letters"]
    assert report["config"]["qwen2_jax"]["programs"] >= 1 and report["lm_eval_version"]
    (samples,) = tmp_path.rglob("samples_qwen2_jax_test_letters_*.jsonl")
    assert len(samples.read_text().splitlines()) == 10
    assert not list((tmp_path / "answers").iterdir())


def test_goes_on_where_it_was_interrupted(run, command, tasks, tmp_path, monkeypatch):
    asked = []
    original = Qwen2JaxLM.loglikelihood_rolling

    def interrupted(self, requests, *rest):
        asked.append(len(requests))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return original(self, requests, *rest)

    monkeypatch.setattr(Qwen2JaxLM, "loglikelihood_rolling", interrupted)
    scored = []
    tokens = Qwen2JaxLM._loglikelihood_tokens
    monkeypatch.setattr(
        Qwen2JaxLM,
        "_loglikelihood_tokens",
        lambda self, requests, *rest, **more: scored.append(len(requests)) or tokens(self, requests, *rest, **more),
    )
    arguments = [*command, named(tasks, "cloze", "rolling"), "--out", tmp_path]
    code, _, _ = run(*arguments)
    assert code == 130 and scored == [5]
    code, _, err = run(*arguments)
    assert code == 0, err
    assert asked == [5, 5] and scored == [5]


def test_answers_are_those_of_this_model_and_mode(run, command, tasks, tmp_path, monkeypatch):
    """Answers that are kept for another way to run are not taken."""
    monkeypatch.setattr("qwen2_jax.commands.evaluate_lm_eval.shutil.rmtree", lambda folder: None)
    tables = []
    for more in ([], ["--max-length", 40], ["--mode", "dca", "--chunk-size", 16, "--local-size", 2]):
        code, out, err = run(*command, named(tasks, "cloze"), "--out", tmp_path, "--json", *more)
        assert code == 0, err
        tables.append(json.loads(out)["results"]["qwen2_jax_test_cloze"]["perplexity,none"])
    assert len(set(tables)) == 3 and len(list((tmp_path / "answers").iterdir())) == 3


def test_bad_input(refused, command, tasks, tmp_path):
    refused(*command, "helaswag", because="no task 'helaswag'; did you mean hellaswag")
    refused(*command, "qqqqqqqqqqqq", because="`lm_eval ls tasks` lists them")
    refused(*command, "", because="--tasks names no task")
    refused(*command, tmp_path / "none.yaml", because="there is no task file")
    refused(*command, named(tasks, "letters"), "--limit", 0, because="--limit must be above 0, got 0")
    refused(*command, named(tasks, "letters"), "--num-fewshot", -1, because="--num-fewshot must be 0 or more")
    refused(*command, named(tasks, "letters"), "--max-length", 129, because="max_length is 129, the model has 128")
    refused(*command, named(tasks, "stops"), "--max-length", 20, because="leaves no room for a prompt")


def test_without_the_harness(refused, command, tasks, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    refused(*command, named(tasks, "letters"), because='pip install "qwen2-jax[eval]"')


def test_empty_data_is_named(run, command, tasks, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    task = (tasks / "cloze.yaml").read_text().replace(str(tasks / "texts.jsonl"), str(tmp_path / "empty.jsonl"))
    (tmp_path / "cloze.yaml").write_text(task)
    code, out, err = run(*command, tmp_path / "cloze.yaml")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "qwen2_jax_test_cloze" in err


def test_the_harness_runs_it_from_its_own_command_line(model, tasks):
    command = [sys.executable, "-m", "qwen2_jax.plugins.lm_eval", "run", "--model", "qwen2_jax"]
    command += ["--model_args", f"path={model}", "--batch_size", "4"]
    command += ["--tasks", str(tasks / "cloze.yaml"), "--limit", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"\|qwen2_jax_test_cloze\|.*\|perplexity\|", ended.stdout)


@pytest.mark.slow
def test_two_processes_equal_one(model, tasks, tmp_path):
    """Each computes its part of every batch; the first one writes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = ["--model", model, "--tasks", named(tasks, "letters", "rolling", "stops", "chat"), "--json"]

    def results(text):
        return [line for line in text.splitlines() if not line.startswith("[Gloo]")]  # of the collectives' library

    def start(devices, *more):
        command = [sys.executable, "-m", "qwen2_jax", "evaluate", "lm-eval", *map(str, [*arguments, *more])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    alone = start(1)
    out, err = alone.communicate(timeout=300)
    assert alone.returncode == 0, err[-3000:]
    joined = ["--coordinator", address, "--processes", 2, "--mesh", "data=4,tensor=2", "--out", tmp_path / "out"]
    both = [start(4, *joined, "--process", process) for process in range(2)]
    ended = [run.communicate(timeout=600) for run in both]
    for run, (_, errors) in zip(both, ended, strict=True):
        assert run.returncode == 0, errors[-3000:]
    assert not results(ended[1][0])
    ours, expected = (json.loads(results(text)[0])["results"] for text in (ended[0][0], out))
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert ours[task][name] == pytest.approx(value, rel=1e-4), (task, name)
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 1
