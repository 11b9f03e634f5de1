"""`qwen2-jax evaluate lm-eval` as a user meets it: a table, the harness's files, going on, one line for mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_jax.plugins.lm_eval import Qwen2JaxLM
from tests.oracles.harness import named

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(model, tasks):
    return ["lm-eval", "--model", model, "--batch-size", 4, "--tasks"]


def test_prints_a_table(run, command, tasks):
    code, out, err = run(*command, named(tasks, "letters", "stops"), "--limit", 4)
    assert code == 0, err
    assert re.search(r"\|qwen2_jax_test_letters\|.*\|acc ", out)
    assert re.search(
        r"[\d,]+ scored tokens/s \([\d,]+ computed\), [\d,]+ new tokens/s, besides [\d.]+ s of compilation in \d+ "
        r"programs, \d+% padding, attention dense, \d+ inputs truncated, \d answers without a stop",
        out,
    )
    # Before anything is computed, and after each kind of requests.
    lines = [line for line in err.splitlines() if "memory per device" in line or "tokens/s" in line]
    assert re.match(r"memory per device: weights [\d.]+ GB, free [\d.]+ GB; each token", lines[0])
    assert "scored tokens/s" in lines[1] and "new tokens/s" in lines[2]


def test_samples_that_cannot_be_run_are_named_and_the_rest_goes_on(run, command, tasks, tmp_path, monkeypatch):
    """A judge that fails, an answer without room, and a continuation that is too long."""
    (tmp_path / "judge.py").write_text(
        "def judge(doc, results):\n"
        "    assert len(doc['text'].split()) != 9, 'a doc of nine'\n"
        "    return {'good': 1.0, 'other': 1.0}\n"
    )
    metrics = "metric_list: [{metric: good, aggregation: mean, higher_is_better: true}, {metric: other, aggregation: "
    metrics += "mean, higher_is_better: false}]\n"
    head = (tasks / "stops.yaml").read_text().partition("metric_list")[0]
    judged = head.replace("_test_stops", "_test_judged") + "process_results: !function judge.judge\n" + metrics
    (tmp_path / "judged.yaml").write_text(judged)
    roomless = (tasks / "stops.yaml").read_text().replace("_test_stops", "_test_roomless")
    (tmp_path / "roomless.yaml").write_text(roomless.replace("max_gen_toks: 24", "max_gen_toks: 128"))
    endings = (tasks / "choices.yaml").read_text().replace("_test_choices", "_test_endings")
    endings = endings.replace("{{choices}}", "{{[choices[0], choices[1] * (20 if answer == 2 else 1), choices[2]]}}")
    (tmp_path / "endings.yaml").write_text(endings)
    names = ",".join(str(tmp_path / f"{name}.yaml") for name in ("judged", "roomless", "endings"))
    out = tmp_path / "out"
    code, printed, err = run(*command, names, "--out", out, "--json")
    assert code == 0, err
    report = json.loads(printed)
    found = report["results"]
    assert found["qwen2_jax_test_judged"]["good,none"] == 0.8  # the one that fails is not good
    assert found["qwen2_jax_test_judged"]["other,none"] == 1.0
    assert 0 <= found["qwen2_jax_test_endings"]["acc,none"] <= 1
    assert report["skipped"][-1] == "qwen2_jax_test_judged, document 2: AssertionError: 'a doc of nine'"
    of_task = [line.partition(",")[0].removeprefix("qwen2_jax_test_") for line in report["skipped"]]
    assert of_task.count("roomless") == 5 and of_task.count("judged") == 1 and of_task.count("endings") == 3
    assert "qwen2_jax_test_roomless, document 0: an answer of up to 128 tokens leaves no room for a prompt" in err
    assert re.search(r"qwen2_jax_test_endings, document 2: the continuation has \d+ tokens, more than the 128", err)
    assert "1 samples could not be judged" in err
    (samples,) = out.rglob("samples_qwen2_jax_test_endings_*.jsonl")
    for sample in map(json.loads, samples.read_text().splitlines()):
        (lost,) = [answer for answer in sample["filtered_resps"][1:2]]
        assert (float(lost[0]) < -128 * 5.6) == (sample["doc"]["answer"] == 2)
    (results,) = out.rglob("results_*.json")
    assert json.loads(results.read_text())["skipped"] == report["skipped"]


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    refused(*command, named(tasks, "letters"), "--xla-flags", "recommended", because="JAX is there already")


def test_no_room_for_any_answer(run, command, tasks):
    code, out, err = run(*command, named(tasks, "stops"), "--max-length", 20)
    assert (code, out) == (2, "") and "leaves no room for a prompt" in err.splitlines()[-1]


def test_without_the_harness(refused, command, tasks, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    refused(*command, named(tasks, "letters"), because='pip install "qwen2-jax[eval]"')


def test_empty_data_is_named(run, command, tasks, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    task = (tasks / "cloze.yaml").read_text().replace(str(tasks / "texts.jsonl"), str(tmp_path / "empty.jsonl"))
    (tmp_path / "cloze.yaml").write_text(task)
    code, out, err = run(*command, tmp_path / "cloze.yaml")
    assert (code, out) == (2, "") and "a data file is empty" in err.splitlines()[-1] and "cloze.yaml" in err


@pytest.mark.slow
def test_the_harness_runs_it_from_its_own_command_line(run, model, tasks):
    """On a mesh and in a mode, which model_args name."""
    dca = ["--mode", "dca", "--chunk-size", 16, "--local-size", 2]
    code, out, err = run("lm-eval", "--model", model, "--tasks", named(tasks, "cloze"), "--limit", 2, *dca)
    assert code == 0, err
    command = [sys.executable, "-m", "qwen2_jax.plugins.lm_eval", "run", "--model", "qwen2_jax"]
    command += ["--model_args", f"path={model},mesh=data=2;tensor=2,mode=dca,chunk_size=16,local_size=2"]
    command += ["--batch_size", "4"]
    command += ["--tasks", str(tasks / "cloze.yaml"), "--limit", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    tables = [re.search(r"\|perplexity *\|\S* *\| *([\d.]+)", text) for text in (ended.stdout, out)]
    assert float(tables[0][1]) == pytest.approx(float(tables[1][1]), rel=1e-3)
