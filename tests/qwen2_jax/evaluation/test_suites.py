"""The suites against the harness that is installed, and the tables that come of results."""

import dataclasses
import importlib.metadata
import json
import warnings

import pytest

from qwen2_jax.evaluation.suites import (
    HARNESS_VERSION,
    SIZES,
    SUITES,
    TASKS_FOLDER,
    SuiteTask,
    definition_rows,
    find_suite,
    markdown,
    pick_tasks,
    plain_cells,
    published_size,
    read_score,
    result_rows,
)
from qwen2_jax.evaluation.task_index import task_manager
from qwen2_jax.long_context import LongContext
from qwen2_jax.sizes import PUBLISHED, published

TASKS = [pytest.param(task, id=f"{suite.name}-{task.key}") for suite in SUITES.values() for task in suite.tasks]
RUNNABLE = [case for case in TASKS if case.values[0].harness]
MMLU, GSM8K, HUMANEVAL = (
    next(task for task in SUITES["qwen2-base"].tasks if task.name == name) for name in ("MMLU", "GSM8K", "HumanEval")
)


@pytest.fixture(scope="module")
def index():
    """Every task of the harness; nothing is loaded but the YAML files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of packages that the harness imports
        return task_manager([str(TASKS_FOLDER)]).task_index


def test_the_table_is_of_the_installed_harness():
    assert importlib.metadata.version("lm_eval") == HARNESS_VERSION


@pytest.mark.parametrize("task", RUNNABLE)
def test_tasks_are_in_the_harness_as_the_table_says(task, index):
    entry = index[task.harness]
    assert entry.kind.name in ("TASK", "GROUP")
    assert str(entry.cfg["metadata"]["version"]) == task.version
    group = entry.kind.name == "GROUP"
    metrics = entry.cfg["aggregate_metric_list" if group else "metric_list"]
    (metric,) = [metric for metric in metrics if metric["metric"] == task.metric]
    if group:
        filters = metric.get("filter_list", "none")
        assert task.filter in ([filters] if isinstance(filters, str) else filters)
    for leaf in leaves(index, task.harness):
        assert task.metric in [metric["metric"] for metric in leaf["metric_list"]]
        assert task.filter in [choice["name"] for choice in leaf.get("filter_list") or [{"name": "none"}]]
        # The harness never overrides a task that says 0 itself.
        assert leaf.get("num_fewshot") != 0 or task.shots == 0
        assert bool(leaf.get("unsafe_code")) == task.runs_code
        assert bool(leaf.get("custom_dataset")) == (task.length is not None)


def leaves(index, name):
    entry = index[name]
    if entry.kind.name == "TASK":
        yield entry.cfg
        return
    members = entry.tags if entry.kind.name == "TAG" else entry.cfg["task"]
    for member in members:
        yield from leaves(index, member if isinstance(member, str) else member.get("task") or member["group"])


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct", "mbpp", "mbpp_instruct"])
def test_our_code_tasks_ask_as_the_harness_does(name, index):
    ours, theirs = index[f"qwen2_jax_{name}"].cfg, index[name].cfg
    same = [
        "dataset_path",
        "dataset_name",
        "test_split",
        "doc_to_text",
        "gen_prefix",
        "target_delimiter",
        "output_type",
    ]
    assert {key: ours.get(key) for key in same} == {key: theirs.get(key) for key in same}
    until = theirs["generation_kwargs"]["until"] + (["[END]"] if name == "mbpp" else [])
    assert ours["generation_kwargs"] == {**theirs["generation_kwargs"], "until": until}


@pytest.mark.parametrize("task", TASKS)
def test_every_entry_explains_itself(task):
    assert task.differs and not task.differs.endswith(".")
    assert set(task.scores) <= set(SIZES)
    assert all(0 < score <= (100 if task.percent else 10) for score in task.scores.values())
    assert task.key == task.key.lower() and "/" not in task.key


def test_names_are_unique_within_a_suite():
    for suite in SUITES.values():
        keys = [task.key for task in suite.tasks]
        assert len(set(keys)) == len(keys)


def test_scores_are_the_reports():
    scores = {(name, task.name): task.scores for name, suite in SUITES.items() for task in suite.tasks}
    assert scores["qwen2-base", "MMLU"] == {"72b": 84.2, "57b-a14b": 76.5, "7b": 70.3, "1.5b": 56.5, "0.5b": 45.4}
    assert scores["qwen2-base", "GPQA"] == {"72b": 37.9, "57b-a14b": 34.3, "7b": 31.8}
    assert scores["qwen2-instruct", "IFEval"]["0.5b"] == 20.0
    assert scores["long-context", "NeedleBench 128k"] == {"72b": 90.27, "7b": 66.32}
    # Nothing else has changed either: each column of each table, summed up.
    sums = {
        name: [round(sum(task.scores.get(size, 0) for task in suite.tasks), 2) for size in SIZES]
        for name, suite in SUITES.items()
    }
    assert sums == {
        "qwen2-base": [1458.9, 1311.9, 1237.3, 642.7, 479.2],
        "qwen2-instruct": [896.59, 730.81, 692.42, 241.9, 165.7],
        "long-context": [619.12, 0, 497.94, 0, 0],
    }
    assert len(SUITES["qwen2-base"].tasks) == 21 and len(SUITES["qwen2-instruct"].tasks) == 15


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["", "-instruct"])
def test_published_sizes_are_recognized(size, kind):
    config = published(f"qwen2-{size}{kind}")
    assert published_size(config) == size
    assert published_size(LongContext("dca").configure(config, 65536)) == size


def test_other_models_have_no_size_in_the_report():
    others = ["qwen2.5-3b", "qwen2.5-14b", "qwen2.5-32b", "qwen2-math-7b", "qwen1.5-moe-a2.7b"]
    assert [published_size(PUBLISHED[name]) for name in others] == [None] * len(others)
    assert published_size(dataclasses.replace(published("qwen2-7b"), num_hidden_layers=27)) is None


def test_unknown_suites_and_tasks_get_the_nearest_names():
    with pytest.raises(ValueError, match="there is no suite 'qwen2-bas'; did you mean qwen2-base"):
        find_suite("qwen2-bas")
    with pytest.raises(ValueError, match="there is no suite 'x'; there are qwen2-base, qwen2-instruct, long-context"):
        find_suite("x")
    base = find_suite("qwen2-base")
    with pytest.raises(ValueError, match="suite qwen2-base has no task 'helaswag'; did you mean hellaswag"):
        pick_tasks(base, ["mmlu", "helaswag"])
    with pytest.raises(ValueError, match="TheoremQA cannot be run: the harness has no TheoremQA"):
        pick_tasks(base, ["theoremqa"])


def test_tasks_are_picked_by_any_of_their_names():
    base = find_suite("qwen2-base")
    assert [task.name for task in pick_tasks(base, ["gsm8k", "minerva_math", "MMLU-Pro"])] == [
        "MMLU-Pro",
        "GSM8K",
        "MATH",
    ]
    assert pick_tasks(base, []) == base.tasks
    needles = pick_tasks(find_suite("long-context"), ["niah_single_2"])
    assert [task.length for task in needles] == [8192, 16384, 32768, 65536, 131072]


def results(task: SuiteTask, value: object, **other: object):
    column = f"{task.metric},{task.filter}"
    own = {"alias": task.harness, column: value, f"{task.metric}_stderr,{task.filter}": 0.01, **other}
    return {
        "results": {task.harness: own, "of a subtask": {column: 0.5}},
        "versions": {task.harness: float(task.version)},
        "n-samples": {"a": {"original": 10, "effective": 4}, "b": {"original": 9, "effective": 3}},
    }


def test_scores_are_read_from_the_harness():
    record = read_score(GSM8K, results(GSM8K, 0.75))
    assert (record["score"], record["error"], record["samples"]) == (75.0, 1.0, 7)
    assert record["metric"] == "exact_match,strict-match" and record["version"] == "3.0"
    assert record["results"]["of a subtask"] == {"exact_match,strict-match": 0.5}
    assert json.loads(json.dumps(record)) == record
    for value in ("N/A", float("nan"), None):
        with pytest.raises(ValueError, match=r"the harness gave no exact_match,strict-match for gsm8k"):
            read_score(GSM8K, results(GSM8K, value))
    with pytest.raises(ValueError, match="but other,none"):
        read_score(GSM8K, {"results": {"gsm8k": {"other,none": 1}}})


def test_samples_that_could_not_be_run_are_named():
    found = results(HUMANEVAL, 0.5)
    found["samples"] = {HUMANEVAL.harness: [{"problem": ""}, *({"problem": f"{n}: no memory"} for n in range(5))]}
    record = read_score(HUMANEVAL, found)
    (row,) = result_rows([HUMANEVAL], {"humaneval": record}, {}, "7b")
    assert row["note"] == "5 samples could not be run: 0: no memory; 1: no memory; 2: no memory and 2 more"


def test_a_task_of_which_nothing_could_be_run_has_no_score():
    found = results(HUMANEVAL, 0.0)
    found["samples"] = {HUMANEVAL.harness: [{"doc_id": 0}, {"doc_id": 1}]}
    found["skipped"] = ["a, document 0: no room"]
    record = read_score(HUMANEVAL, found, truncated=3)
    (row,) = result_rows([HUMANEVAL], {"humaneval": record}, {}, None)
    assert (
        row["note"].startswith("3 inputs were too long") and "1 samples could not be run: a, document 0" in row["note"]
    )
    found["skipped"].append("a, document 1: no room")
    with pytest.raises(ValueError, match="no sample could be run: a, document 0: no room and 1 more"):
        read_score(HUMANEVAL, found)


def test_rows_stand_beside_the_report():
    records = {"mmlu": read_score(MMLU, {**results(MMLU, 0.7), "versions": {"mmlu": 2}})}
    theorems = next(task for task in SUITES["qwen2-base"].tasks if task.name == "TheoremQA")
    rows = result_rows([MMLU, GSM8K, theorems], records, {"gsm8k": "no data"}, "7b")
    assert [row["status"] for row in rows] == ["done", "not run", "no task"]
    assert rows[0]["report"] == 70.3 and rows[0]["difference"] == pytest.approx(-0.3) and rows[0]["note"] == ""
    assert rows[1]["score"] is None and rows[1]["note"] == "no data" and rows[1]["report"] == 79.9
    assert rows[2]["task"] is None and rows[2]["report"] == 31.1
    for size in ("1.5b", None):
        (row,) = result_rows([MMLU], records, {}, size)
        assert row["report"] == (56.5 if size else None)
    assert json.loads(json.dumps(rows)) == rows


def test_another_version_of_a_task_is_said():
    record = read_score(MMLU, {**results(MMLU, 0.7), "versions": {"mmlu": 3}})
    (row,) = result_rows([MMLU], {"mmlu": record}, {}, "7b")
    assert row["note"] == "version 3 of the task, not 2" and row["version"] == "3"


def test_the_page_has_a_table_and_what_differs():
    records = {"mmlu": read_score(MMLU, {**results(MMLU, 0.7), "versions": {"mmlu": 2}})}
    rows = result_rows([MMLU, GSM8K], records, {"gsm8k": "broken | pipe"}, "7b")
    page = markdown("a title", rows, "7b")
    lines = page.splitlines()
    assert lines[0] == "# a title"
    assert "| MMLU | mmlu v2 | 5 | 70.0 ±1.0 | 70.3 | -0.3 |  |" in lines
    assert "| GSM8K | gsm8k v3.0 | 5 |  | 79.9 |  | broken \\| pipe |" in lines
    assert f"- **GSM8K**: {GSM8K.differs}." in lines
    assert {len(cells) for cells in plain_cells(rows, None)} == {7}


def test_definitions_are_data():
    for suite in SUITES.values():
        rows = definition_rows(suite)
        assert json.loads(json.dumps(rows)) == rows
        assert [row["name"] for row in rows] == [task.key for task in suite.tasks]
