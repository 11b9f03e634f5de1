"""The benchmarks of Qwen2's report, as tasks of the evaluation harness, with the scores that the report prints.

Source: Qwen2 technical report (arXiv 2407.10671), section 5: Tables 2-5 (base models), 6-9 (instruct), Figure 1 and
Table 12 (long inputs). Harness: lm-evaluation-harness 0.4.13. A score that comes from another prompt or another way of
reading the answer is another measurement: `SuiteTask.differs` says what differs, and a difference from the report of a
point or two says little.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2_jax.config import Qwen2Config
from qwen2_jax.sizes import PUBLISHED

HARNESS_VERSION = "0.4.13"
"""The harness whose tasks the table names."""

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Where the tasks that begin with `qwen2_jax_` are defined."""

SIZES = ("72b", "57b-a14b", "7b", "1.5b", "0.5b")
"""The sizes of the report."""

_NOT_OF_THE_SHAPE = (  # what may differ between a published model and a copy or relative of the same weights' shape
    *("max_position_embeddings", "yarn", "dual_chunk", "rms_norm_eps", "initializer_range", "router_aux_loss_coef"),
    "hf_json",
)


@dataclasses.dataclass(frozen=True)
class SuiteTask:
    """A benchmark of the report, and the task that stands for it."""

    name: str
    """The report's."""
    harness: str | None
    """Task or group of the harness, or of TASKS_FOLDER; None where there is none that measures the same thing."""
    differs: str
    """What differs from the report, or why there is no task."""
    version: str = ""
    """Of the task's definition, as the harness has it."""
    shots: int = 0
    """Examples in the prompt."""
    metric: str = "acc"
    filter: str = "none"
    runs_code: bool = False
    length: int | None = None
    """Tokens of a prompt, for a task whose prompts the harness makes itself."""
    percent: bool = True
    """Whether the harness's value is a share, 1 at most, where the report has a percentage."""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The report's, by size."""

    @property
    def key(self) -> str:
        """What names it on the command line and in file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Suite:
    name: str
    title: str
    chat: bool
    """Whether prompts are messages in the checkpoint's chat template."""
    tasks: tuple[SuiteTask, ...]

    @property
    def runnable(self) -> tuple[SuiteTask, ...]:
        return tuple(task for task in self.tasks if task.harness is not None)


def _scores(*values: float | None) -> dict[str, float]:
    """In the order of SIZES; None where the report has a dash."""
    return {size: value for size, value in zip(SIZES, values, strict=True) if value is not None}


_LIKELIHOOD = "chosen by the likelihood of the answer's letter; the report does not say how it reads answers"
_SANDBOX = "same prompt and data as the harness's own task; programs run in this project's sandbox, for 10 seconds"
_SHOTS_UNKNOWN = "the report gives no number of examples for instruct models; this is the one for base models"
_JUDGED = "answers are judged by another model, which no task of the harness does"

_BASE = (
    SuiteTask("MMLU", "mmlu", _LIKELIHOOD, "2", 5, scores=_scores(84.2, 76.5, 70.3, 56.5, 45.4)),
    SuiteTask(
        *("MMLU-Pro", "mmlu_pro", "chain of thought with the examples of MMLU-Pro's authors", "2.0", 5),
        metric="exact_match",
        filter="custom-extract",
        scores=_scores(55.6, 43.0, 40.0, 21.8, 14.7),
    ),
    SuiteTask(
        *("GPQA", "gpqa_main_n_shot"),
        "the main set, examples drawn from it too, chosen by likelihood; the report does not say which set it used",
        version="2.2",
        shots=5,
        scores=_scores(37.9, 34.3, 31.8, None, None),
    ),
    SuiteTask(
        *("TheoremQA", None, "the harness has no TheoremQA; the report uses 5 examples"),
        scores=_scores(43.1, 33.5, 31.1, 15.0, 8.9),
    ),
    SuiteTask(
        *("BBH", "bbh", "chain of thought; an answer counts only after 'the answer is'", "3.0", 3),
        metric="exact_match",
        filter="get-answer",
        scores=_scores(82.4, 67.0, 62.6, 37.2, 28.4),
    ),
    SuiteTask(
        *("HellaSwag", "hellaswag", "validation set; endings compared by likelihood per character", "1.0", 10),
        metric="acc_norm",
        scores=_scores(87.6, 85.2, 80.7, 66.6, 49.3),
    ),
    SuiteTask(
        *("Winogrande", "winogrande", "validation set of winogrande_xl, as the test set's answers are secret"),
        version="1.0",
        shots=5,
        scores=_scores(85.1, 79.5, 77.0, 66.2, 56.8),
    ),
    SuiteTask(
        *("ARC-C", "arc_challenge", "answers compared by likelihood per character; the report does not say how"),
        version="1.0",
        shots=25,
        metric="acc_norm",
        scores=_scores(68.9, 64.1, 60.6, 43.9, 31.5),
    ),
    SuiteTask(
        *("TruthfulQA", "truthfulqa_mc2"),
        "several true answers (mc2); six fixed questions stand before each, though the report says 0 examples",
        version="3.0",
        shots=0,
        scores=_scores(54.8, 57.7, 54.2, 45.9, 39.7),
    ),
    SuiteTask(
        *("HumanEval", "qwen2_jax_humaneval", _SANDBOX, "1.0", 0, "pass@1"),
        runs_code=True,
        scores=_scores(64.6, 53.0, 51.2, 31.1, 22.0),
    ),
    SuiteTask(
        *("MBPP", "qwen2_jax_mbpp"),
        f"{_SANDBOX}; the harness itself gives 3 examples, the report 0; the report's prompt is not known",
        version="1.0",
        shots=0,
        metric="pass@1",
        runs_code=True,
        scores=_scores(76.9, 71.9, 65.9, 37.4, 22.0),
    ),
    SuiteTask(
        *("EvalPlus", None, "the average of four sets; of MBPP+ the harness runs only the tests that MBPP has too"),
        scores=_scores(65.4, 57.2, 54.2, None, None),
    ),
    SuiteTask(
        *("MultiPL-E", None, "the harness has no MultiPL-E; it needs the compilers of eight languages"),
        scores=_scores(59.6, 49.8, 46.3, None, None),
    ),
    SuiteTask(
        *("GSM8K", "gsm8k", "examples from the training set; the report says 5, the model cards say 4", "3.0", 5),
        metric="exact_match",
        filter="strict-match",
        scores=_scores(89.5, 80.7, 79.9, 58.5, 36.5),
    ),
    SuiteTask(
        *("MATH", "minerva_math", "Minerva's four examples; answers compared by sympy; needs lm_eval[math]"),
        version="1.0",
        shots=4,
        metric="exact_match",
        scores=_scores(51.1, 43.0, 44.2, 21.7, 10.7),
    ),
    SuiteTask(
        *("C-Eval", "ceval-valid", "validation set, as the test set's answers are secret; chosen by likelihood"),
        version="2.0",
        shots=5,
        scores=_scores(91.0, 87.7, 83.2, 70.6, 58.2),
    ),
    SuiteTask("CMMLU", "cmmlu", _LIKELIHOOD, "1.0", 5, scores=_scores(90.1, 88.5, 83.9, 70.3, 55.1)),
    SuiteTask(
        *("Multi-Exam", None, "an average over M3Exam, IndoMMLU, ruMMLU and a translated MMLU; the harness lacks some"),
        scores=_scores(76.6, 65.5, 59.2, None, None),
    ),
    SuiteTask(
        *("Multi-Understanding", None),
        "an average over BELEBELE, XCOPA, XWinograd, XStoryCloze and PAWS-X; the report does not say which languages",
        scores=_scores(80.7, 77.0, 72.0, None, None),
    ),
    SuiteTask(
        *("Multi-Mathematics", None, "an average over MGSM; the report does not say which languages"),
        scores=_scores(76.0, 62.3, 57.5, None, None),
    ),
    SuiteTask(
        *("Multi-Translation", None, "the harness has Flores only in sets of its own making"),
        scores=_scores(37.8, 34.5, 31.5, None, None),
    ),
)

_INSTRUCT = (
    SuiteTask(
        *("MMLU", "mmlu", f"{_SHOTS_UNKNOWN}; {_LIKELIHOOD}", "2", 5),
        scores=_scores(82.3, 75.4, 70.5, 52.4, 37.9),
    ),
    SuiteTask(
        *("MMLU-Pro", "mmlu_pro", _SHOTS_UNKNOWN, "2.0", 5, "exact_match", "custom-extract"),
        scores=_scores(64.4, 52.8, 44.1, None, None),
    ),
    SuiteTask(
        *("GPQA", "gpqa_main_cot_zeroshot"),
        "the main set without examples, the last letter in brackets counts; the report says neither set nor examples",
        version="2.2",
        shots=0,
        metric="exact_match",
        filter="flexible-extract",
        scores=_scores(42.4, 34.3, 34.3, None, None),
    ),
    SuiteTask(
        *("TheoremQA", None, "the harness has no TheoremQA"),
        scores=_scores(44.4, 33.1, 25.3, None, None),
    ),
    SuiteTask(
        *("HumanEval", "qwen2_jax_humaneval_instruct", f"{_SANDBOX}; the answer's beginning is given"),
        version="1.0",
        shots=0,
        metric="pass@1",
        runs_code=True,
        scores=_scores(86.0, 79.9, 79.9, 47.0, 29.9),
    ),
    SuiteTask(
        *("MBPP", "qwen2_jax_mbpp_instruct"),
        f"{_SANDBOX}; the answer's beginning is given; no examples, where the harness itself gives 3; of an answer the "
        "harness drops the first word and whatever stands in a block that is not closed, which count here",
        version="1.0",
        shots=0,
        metric="pass@1",
        runs_code=True,
        scores=_scores(80.2, 70.9, 67.2, 51.9, 37.8),
    ),
    SuiteTask(
        *("MultiPL-E", None, "the harness has no MultiPL-E; it needs the compilers of eight languages"),
        scores=_scores(69.2, 66.4, 59.1, None, None),
    ),
    SuiteTask(
        *("LiveCodeBench v1", None, "the harness has no LiveCodeBench"),
        scores=_scores(35.7, 25.5, 26.6, None, None),
    ),
    SuiteTask(
        *("GSM8K", "gsm8k", f"{_SHOTS_UNKNOWN}; the last number of the answer counts", "3.0", 5),
        metric="exact_match",
        filter="flexible-extract",
        scores=_scores(93.2, 85.3, 85.7, 61.6, 40.1),
    ),
    SuiteTask(
        *("MATH", "minerva_math", f"{_SHOTS_UNKNOWN}; answers compared by math_verify; needs lm_eval[math]"),
        version="1.0",
        shots=4,
        metric="math_verify",
        scores=_scores(69.0, 49.1, 52.9, None, None),
    ),
    SuiteTask("MT-Bench", None, _JUDGED, percent=False, scores=_scores(9.12, 8.55, 8.41, None, None)),
    SuiteTask("MixEval", None, _JUDGED, scores=_scores(86.7, 82.3, 76.5, None, None)),
    SuiteTask(
        *("IFEval", "ifeval", "strict, by prompt, as in the report; needs lm_eval[ifeval]", "4.0", 0),
        metric="prompt_level_strict_acc",
        scores=_scores(77.6, 59.9, 54.7, 29.0, 20.0),
    ),
    SuiteTask("AlignBench", None, _JUDGED, percent=False, scores=_scores(8.27, 7.36, 7.21, None, None)),
    SuiteTask("Arena-Hard", None, _JUDGED, scores=_scores(48.1, None, None, None, None)),
)

_NEEDLEBENCH = {  # with YaRN and DCA beyond 32K, which change nothing within
    "8k": (91.90, 87.07),
    "32k": (92.01, 73.64),
    "128k": (90.27, 66.32),
    "256k": (85.21, 60.71),
}
_LV_EVAL = {
    "16k": (58.82, 49.77),
    "32k": (56.70, 46.93),
    "64k": (53.03, 42.14),
    "128k": (48.83, 36.64),
    "256k": (42.35, 34.72),
}

_LONG = (
    *(
        SuiteTask(
            *(f"NIAH {length // 1024}k", "niah_single_2"),
            "RULER's needle in essays, where the report has a heat map without numbers; needs lm_eval[ruler] and a "
            "network for the essays; `qwen2-jax evaluate needle` draws such a heat map and needs neither",
            version="1.0",
            shots=0,
            metric=str(length),
            length=length,
        )
        for length in (8192, 16384, 32768, 65536, 131072)
    ),
    *(
        SuiteTask(
            *(f"NeedleBench {length}", None),
            "the harness has no NeedleBench; `qwen2-jax evaluate needle --task multi-needle` hides several facts too; "
            "the report's score is with YaRN and DCA beyond 32K",
            scores=_scores(scores[0], None, scores[1], None, None),
        )
        for length, scores in _NEEDLEBENCH.items()
    ),
    *(
        SuiteTask(
            *(f"LV-Eval {length}", None),
            "the harness has no LV-Eval; LongBench, below, asks about long texts too; the report's score is with YaRN "
            "and DCA beyond 32K",
            scores=_scores(scores[0], None, scores[1], None, None),
        )
        for length, scores in _LV_EVAL.items()
    ),
    SuiteTask(
        *("LongBench", "longbench", "not in the report, so there is no score to compare with", "0.0", 0, "score"),
    ),
)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("qwen2-base", "base models, Tables 2-5", False, _BASE),
        Suite("qwen2-instruct", "instruct models, Tables 6-9", True, _INSTRUCT),
        Suite("long-context", "long inputs, Figure 1 and Table 12 (instruct models)", True, _LONG),
    )
}


def find_suite(name: str) -> Suite:
    """
    Raises:
      ValueError: if there is no such suite; the nearest names are offered.
    """
    if (suite := SUITES.get(name.lower())) is None:
        raise ValueError(f"there is no suite {name!r}; {_nearest(name, SUITES)}")
    return suite


def pick_tasks(suite: Suite, names: Sequence[str]) -> tuple[SuiteTask, ...]:
    """Those tasks of a suite that `names` says, in the suite's order; all of them if it is empty.

    Args:
      names: keys, the report's names, or the harness's.

    Raises:
      ValueError: for a name that no benchmark of the suite has (the nearest are offered), or one without a task.
    """
    if not names:
        return suite.tasks
    by_name: dict[str, list[SuiteTask]] = {}
    for task in suite.tasks:
        for name in dict.fromkeys((task.key, task.name.lower(), task.harness or task.key)):
            by_name.setdefault(name, []).append(task)
    chosen: list[SuiteTask] = []
    for name in names:
        if (found := by_name.get(name.lower())) is None:
            keys = [task.key for task in suite.runnable]
            raise ValueError(f"suite {suite.name} has no task {name!r}; {_nearest(name, by_name, keys)}")
        if without := [task for task in found if task.harness is None]:
            raise ValueError(f"{without[0].name} cannot be run: {without[0].differs}")
        chosen += found
    return tuple(task for task in suite.tasks if task in chosen)


def _nearest(name: str, known: Iterable[str], shown: Iterable[str] | None = None) -> str:
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(known if shown is None else shown)}"


def published_size(config: Qwen2Config) -> str | None:
    """Which of SIZES a model has, by the shape of its weights and its rotary base; None if it is none of them.

    Relatives of the same shape, as Qwen2.5 has them, cannot be told apart.
    """
    for size in SIZES:
        reference = PUBLISHED[f"qwen2-{size}"]
        if all(
            getattr(config, field.name) == getattr(reference, field.name)
            for field in dataclasses.fields(Qwen2Config)
            if field.name not in _NOT_OF_THE_SHAPE
        ):
            return size
    return None


def read_score(task: SuiteTask, results: Mapping[str, Any], truncated: int = 0) -> dict[str, Any]:
    """What is kept of a finished task.

    Args:
      task: the task.
      results: what the harness returns, and the samples that were skipped.
      truncated: inputs that lost their beginning.

    Raises:
      ValueError: if the metric is not there, or is not a number, or no sample could be run.
    """
    assert task.harness is not None
    table = results["results"]
    own = table.get(task.harness, {})
    column = f"{task.metric},{task.filter}"
    value = own.get(column)
    if not isinstance(value, int | float) or not math.isfinite(value):
        found = ", ".join(name for name in own if "," in name and "_stderr," not in name) or "nothing"
        raise ValueError(f"the harness gave no {column} for {task.harness}, but {found}")
    error = own.get(f"{task.metric}_stderr,{task.filter}")
    scale = 100.0 if task.percent else 1.0
    counts = results.get("n-samples", {})
    samples = sum(count["effective"] for count in counts.values()) or own.get("sample_len")
    skipped = list(results.get("skipped", ()))
    logged = results.get("samples", {}).items()
    if skipped and len(skipped) >= len({(name, sample["doc_id"]) for name, of_task in logged for sample in of_task}):
        raise ValueError(f"no sample could be run: {few(skipped, 1)}")
    return {
        "task": task.key,
        "harness": task.harness,
        "version": str(results.get("versions", {}).get(task.harness, "")),
        "shots": task.shots,
        "metric": column,
        "score": value * scale,
        "error": error * scale if isinstance(error, int | float) else None,
        "samples": samples,
        "truncated": truncated,
        "timed_out": own.get(f"timed_out,{task.filter}"),
        "problems": [
            sample["problem"]
            for samples in results.get("samples", {}).values()
            for sample in samples
            if sample.get("problem")
        ]
        + skipped,
        "results": {
            name: {metric: number for metric, number in metrics.items() if isinstance(number, int | float | str)}
            for name, metrics in table.items()
        },
    }


def result_rows(
    tasks: Iterable[SuiteTask], records: Mapping[str, Mapping[str, Any]], notes: Mapping[str, str], size: str | None
) -> list[dict[str, Any]]:
    """The rows of a suite's table.

    Args:
      tasks: of the suite.
      records: by key, `read_score` of the tasks that are finished.
      notes: by key, why others are not.
      size: whose scores in the report to put beside; None for a model that has none.
    """
    rows = []
    for task in tasks:
        record = records.get(task.key)
        report = task.scores.get(size) if size else None
        remarks = [notes[task.key]] if task.key in notes else []
        if record is None:
            status = "no task" if task.harness is None else "not run"
            score = error = samples = None
        else:
            status, score, error, samples = "done", record["score"], record["error"], record["samples"]
            if record["version"] != task.version:
                remarks.append(f"version {record['version']} of the task, not {task.version}")
            if record["truncated"]:
                remarks.append(f"{record['truncated']} inputs were too long and lost their beginning")
            if problems := record["problems"]:
                remarks.append(f"{len(problems)} samples could not be run: {few(problems)}")
        rows.append(
            {
                "benchmark": task.name,
                "task": task.harness,
                "version": record["version"] if record else task.version,
                "shots": task.shots if task.harness else None,
                "metric": f"{task.metric},{task.filter}" if task.harness else None,
                "status": status,
                "score": score,
                "error": error,
                "samples": samples,
                "report": report,
                "difference": score - report if score is not None and report is not None else None,
                "note": "; ".join(remarks),
                "differs": task.differs,
            }
        )
    return rows


def plain_cells(rows: Iterable[Mapping[str, Any]], size: str | None) -> list[list[str]]:
    """A table's cells as text, the header first."""
    cells = [["benchmark", "task", "shots", "score", f"report, {size}" if size else "report", "difference", "note"]]
    for row in rows:
        task = "none" if row["task"] is None else f"{row['task']} v{row['version']}"
        score = _number(row["score"]) + (f" ±{row['error']:.1f}" if row["error"] is not None else "")
        difference = "" if row["difference"] is None else f"{row['difference']:+.1f}"
        note = row["note"] or ("" if row["status"] == "done" else row["status"])
        shots = "" if row["shots"] is None else str(row["shots"])
        cells.append([row["benchmark"], task, shots, score, _number(row["report"]), difference, note])
    return cells


def markdown(title: str, rows: Sequence[Mapping[str, Any]], size: str | None) -> str:
    """A page with a suite's table, and below it what differs from the report."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in plain_cells(rows, size)]
    cells.insert(1, ["---", "---", "---:", "---:", "---:", "---:", "---"])
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    remarks = "\n".join(f"- **{row['benchmark']}**: {row['differs']}." for row in rows)
    return f"# {title}\n\n{table}\n\n## What differs from the report\n\n{remarks}\n"


def definition_rows(suite: Suite) -> list[dict[str, Any]]:
    """A suite as it is defined, without any result."""
    return [
        {
            "name": task.key,
            "benchmark": task.name,
            "task": task.harness,
            "version": task.version,
            "shots": task.shots if task.harness else None,
            "metric": f"{task.metric},{task.filter}" if task.harness else None,
            "runs_code": task.runs_code,
            "differs": task.differs,
            "report": dict(task.scores),
        }
        for task in suite.tasks
    ]


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".removesuffix("0")
