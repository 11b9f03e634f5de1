"""`qwen2-jax evaluate suite` on small local files: tables, going on after a stop, and what cannot be run."""

import json
import re
import warnings
from pathlib import Path

import pytest

from qwen2_jax.command import exit_code, parse
from qwen2_jax.commands import evaluate_suite
from qwen2_jax.evaluation import local_data
from qwen2_jax.evaluation.suites import TASKS_FOLDER

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of packages that the harness imports
    import datasets
    from lm_eval.api.model import LM

pytestmark = pytest.mark.usefixtures("data_sets_stay_here")

ADDITION = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MISSING = {**ADDITION, "task_id": "HumanEval/1", "entry_point": "sub", "prompt": "def add(a, b):\n"}


class Knowing(LM):
    """Prefers the ending that says right, and answers every question with 4."""

    def __init__(self):
        super().__init__()
        self.prompts, self.seen, self.truncated = [], [], 0
        self.interrupt_at = None

    def see(self, prompts_of=None):
        self.seen.append(prompts_of)

    def usage(self):
        return {
            **dict.fromkeys(("scored_tokens_per_second", "new_tokens_per_second")),
            **dict.fromkeys(("scoring_padding", "prompt_padding", "compile_seconds"), 0.0),
            **{"programs": 7, "attention": {}, "answers_without_stop": 0, "skipped": 0, "truncated": self.truncated},
        }

    def loglikelihood(self, requests, disable_tqdm=False):
        return [self._answer(request, (0.0 if "right" in request.args[1] else -9.0, False)) for request in requests]

    def generate_until(self, requests, disable_tqdm=False):
        program = "    return a + b\n"
        return [
            self._answer(request, program if "def add" in request.args[0] else " 2 + 2 = 4\n#### 4")
            for request in requests
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        text = "".join(f"<{message['role']}>{message['content']}" for message in chat_history)
        return text + ("<assistant>" if add_generation_prompt else "")

    def chat_template(self, chat_template=False):
        return "a template"

    tokenizer_name = "knowing"

    def _answer(self, request, answer):
        if len(self.prompts) == self.interrupt_at:
            raise KeyboardInterrupt
        self.prompts.append(request.args[0])
        self.cache_hook.add_partial(request.request_type, request.args, answer)
        return answer


@pytest.fixture
def knowing(monkeypatch):
    model = Knowing()
    monkeypatch.setattr(evaluate_suite, "open_model", lambda options: model)
    return model


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    endings = ["is wrong.", "is the right one.", "is bad.", "is false."]
    question = {"activity_label": "A", "ctx_a": "One", "ctx_b": "it", "endings": endings, "label": "1"}
    sum_up = {"question": "What is 2 + 2?", "answer": "It is 4.\n#### 4"}
    write(
        folder / "hellaswag",
        train=[{**question, "ctx_a": f"One {n}"} for n in range(12)],
        validation=[{**question, "label": n} for n in "1110"],
    )
    write(
        folder / "gsm8k",
        train=[{**sum_up, "question": f"What is {n}?"} for n in range(6)],
        test=[sum_up, {**sum_up, "answer": "#### 5"}],
    )
    write(folder / "qwen2_jax_humaneval", test=[ADDITION, MISSING])
    return folder


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def suite(model, tmp_path, data, capsys):
    """Runs the command in this process: exit status, standard output, standard error."""

    def run(*argv, name="qwen2-base", model=model):
        capsys.readouterr()
        flags = ["--model", model, "--out", tmp_path / "out", *argv]
        words = [
            str(word) for word in [name, *([] if "--list" in argv else flags), *(argv if "--list" in argv else [])]
        ]
        code = exit_code(
            lambda: evaluate_suite.run(parse(evaluate_suite.Options, words, prog="qwen2-jax evaluate suite"))
        )
        return code, *capsys.readouterr()

    return run


def table(text):
    return {row["benchmark"]: row for row in json.loads(text)["table"]}


PICK = ["--tasks", "hellaswag", "gsm8k", "humaneval"]


def test_scores_come_out_right_and_stand_in_both_files(suite, knowing, data, tmp_path):
    code, out, err = suite(*PICK, "--data-dir", data, "--allow-code-execution", "--json")
    assert code == 0, err
    rows = table(out)
    assert [rows[name]["score"] for name in ("HellaSwag", "GSM8K", "HumanEval")] == [75.0, 50.0, 50.0]
    assert [rows[name]["samples"] for name in ("HellaSwag", "GSM8K", "HumanEval")] == [4, 2, 2]
    assert rows["MMLU"]["status"] == "not run" and rows["MMLU"]["note"] == "not asked for"
    assert rows["TheoremQA"]["status"] == "no task"
    report = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert report["table"] == json.loads(out)["table"] and report["size"] is None
    page = (tmp_path / "out" / "suite.md").read_text()
    assert "| HellaSwag | hellaswag v1.0 | 10 | 75.0 " in page and "What differs from the report" in page
    record = json.loads((tmp_path / "out" / "tasks" / "gsm8k.json").read_text())
    assert record["data"] == str(data) and record["metric"] == "exact_match,strict-match"
    assert not (tmp_path / "out" / "cache").exists() or not any((tmp_path / "out" / "cache").rglob("*.db"))
    # Five examples before the question, ten before the ending.
    assert max(prompt.count("Question: ") for prompt in knowing.prompts) == 6
    assert max(prompt.count("A: One") for prompt in knowing.prompts) == 11


def test_a_published_size_has_the_reports_scores_beside(suite, knowing, data, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_suite, "published_size", lambda config: "0.5b")
    code, out, _ = suite("--tasks", "gsm8k", "--data-dir", data)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.strip().startswith("GSM8K")]
    assert re.split(r"\s{2,}", line.strip())[:2] == ["GSM8K", "gsm8k v3.0"] and "36.5" in line and "+13.5" in line
    assert "compared with Qwen2-0.5B" in (tmp_path / "out" / "suite.md").read_text()


def test_what_cannot_be_run_is_named_and_the_rest_goes_on(suite, knowing, data, tmp_path):
    code, out, err = suite(*PICK, "--tasks", "hellaswag", "mmlu", "humaneval", "--data-dir", data, "--json")
    assert code == 0, err
    rows = table(out)
    assert rows["HellaSwag"]["score"] == 75.0
    assert rows["HumanEval"]["note"] == "runs programs that the model writes; --allow-code-execution lets it"
    assert rows["MMLU"]["note"].startswith("no data: ") and "57 folders mmlu_abstract" in rows["MMLU"]["note"]
    assert "Traceback" in (tmp_path / "out" / "errors" / "mmlu.txt").read_text()


def test_nothing_to_run_is_an_error(suite, knowing, tmp_path):
    code, _, err = suite("--tasks", "mmlu")
    assert code == 2
    assert "none of 1 tasks could be run; MMLU: no data: " in err and "--data-dir" in err
    assert (tmp_path / "out" / "suite.md").is_file()
    code, _, err = suite("--tasks", "humaneval")
    assert code == 2 and "--allow-code-execution" in err


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (lambda data: (data / "gsm8k" / "test.jsonl").write_text("\n"), "test.jsonl is empty"),
        (lambda data: (data / "gsm8k" / "train.jsonl").unlink(), "has no train.jsonl or .parquet, which gsm8k reads"),
        (lambda data: [path.unlink() for path in (data / "gsm8k").iterdir()], "has no .jsonl and no .parquet file"),
        (lambda data: (data / "gsm8k" / "test.parquet").write_text(""), "keep one kind"),
        (
            lambda data: write(data / "gsm8k", train=[{"question": "What?", "answer": "#### 4"}]),
            "fewer than 5 examples",
        ),
        (lambda data: (data / "gsm8k" / "test.jsonl").write_text("{"), "gsm8k"),
        (lambda data: write(data / "gsm8k", test=[{"text": "no question"}]), "question"),
    ],
)
def test_bad_data_is_named(suite, knowing, data, change, because):
    change(data)
    code, out, err = suite("--tasks", "gsm8k", "hellaswag", "--data-dir", data, "--json")
    assert code == 0, err
    assert table(out)["GSM8K"]["status"] == "not run"
    note = table(out)["GSM8K"]["note"]
    assert note and "\n" not in note
    if because not in ("gsm8k", "question"):
        assert because in note, note


def test_a_part_of_a_group_is_no_group(suite, knowing, data):
    write(data / "mmlu_anatomy", test=[{}], dev=[{}])
    code, _, err = suite("--tasks", "mmlu", "--data-dir", data)
    assert code == 2 and "has data for a part of mmlu only; there is no folder mmlu_" in err


def test_groups_read_a_folder_for_each_of_their_tasks(suite, knowing, data):
    question = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "x"}
    for leaf in local_data.leaf_tasks("mmlu"):
        write(data / leaf, test=[question], dev=[{**question, "question": f"{n}?"} for n in range(5)])
    code, out, err = suite("--tasks", "mmlu", "--data-dir", data, "--json")
    assert code == 0, err
    assert table(out)["MMLU"]["samples"] == 57 and table(out)["MMLU"]["score"] == 0.0


def test_parquet_is_read_too(suite, knowing, data):
    for split in ("train", "test"):
        path = data / "gsm8k" / f"{split}.jsonl"
        datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()]).to_parquet(
            path.with_suffix(".parquet")
        )
        path.unlink()
    code, out, err = suite("--tasks", "gsm8k", "--data-dir", data, "--json")
    assert code == 0 and table(out)["GSM8K"]["score"] == 50.0, err


def test_an_interrupted_run_goes_on(suite, knowing, data, tmp_path):
    knowing.interrupt_at = 17  # hellaswag has 16 requests, of humaneval one is left
    flags = [*PICK, "--data-dir", data, "--allow-code-execution"]
    assert suite(*flags)[0] == 130
    assert [path.name for path in (tmp_path / "out" / "tasks").iterdir()] == ["hellaswag.json"]
    knowing.interrupt_at = None
    code, _, err = suite(*flags)
    assert code == 0, err
    assert len(knowing.prompts) == 16 + 2 + 2  # nothing twice
    asked = len(knowing.prompts)
    assert suite(*flags)[0] == 0
    assert len(knowing.prompts) == asked


def test_more_tasks_join_those_that_are_there(suite, knowing, data):
    assert suite("--tasks", "gsm8k", "--data-dir", data)[0] == 0
    code, out, _ = suite("--tasks", "hellaswag", "--data-dir", data, "--json")
    assert code == 0 and [table(out)[name]["status"] for name in ("GSM8K", "HellaSwag")] == ["done", "done"]


def test_scores_on_other_data_are_measured_again(suite, knowing, data, tmp_path):
    both = ["--tasks", "gsm8k", "hellaswag"]
    assert suite(*both, "--data-dir", data)[0] == 0
    asked = len(knowing.prompts)
    other = json.loads((data / "gsm8k" / "test.jsonl").read_text().splitlines()[0])
    write(data / "gsm8k", test=[{**other, "question": "What is 1 + 3?"}])
    code, out, _ = suite(*both, "--data-dir", data, "--json")
    assert code == 0 and table(out)["GSM8K"]["score"] == 100.0 and table(out)["HellaSwag"]["score"] == 75.0
    assert len(knowing.prompts) == asked + 1
    # Another folder with the same files is the same data.
    data = data.rename(tmp_path / "moved")
    assert suite(*both, "--data-dir", data)[0] == 0 and len(knowing.prompts) == asked + 1
    # And without them, what was measured on them is no score of these tasks.
    code, out, _ = suite("--tasks", "humaneval", "--data-dir", tmp_path / "out", "--json")
    assert "GSM8K" not in [row["benchmark"] for row in json.loads(out or '{"table": []}')["table"] if row["score"]]
    report = json.loads((tmp_path / "out" / "suite.json").read_text())
    (row,) = [row for row in report["table"] if row["benchmark"] == "GSM8K"]
    assert row["status"] == "not run" and row["note"].startswith("not asked for; what is there of it is of other")


def test_inputs_that_lost_their_beginning_are_said(suite, knowing, data, tmp_path, monkeypatch):
    original = Knowing.generate_until

    def cutting(self, requests, disable_tqdm=False):
        self.truncated += 2
        return original(self, requests)

    monkeypatch.setattr(Knowing, "generate_until", cutting)
    code, out, _ = suite("--tasks", "gsm8k", "hellaswag", "--data-dir", data)
    assert code == 0 and "2 inputs were too long and lost their beginning" in out and "in 7 programs" in out
    report = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert report["usage"]["programs"] == 7
    notes = {row["benchmark"]: row["note"] for row in report["table"]}
    assert notes["GSM8K"].startswith("2 inputs were too long") and notes["HellaSwag"] == ""


def test_prompts_that_the_model_cannot_see_are_not_run(suite):
    code, _, err = suite("--tasks", "niah-8k", name="long-context")
    assert code == 2 and "the model sees 128 tokens at once, its prompts have 8192; mode=yarn and mode=dca" in err


def test_other_settings_are_refused_in_the_same_folder(suite, knowing, data):
    assert suite("--tasks", "gsm8k", "--data-dir", data)[0] == 0
    code, _, err = suite("--tasks", "gsm8k", "--data-dir", data, "--limit", 1)
    assert code == 2 and "other settings (limit: null, now 1)" in err
    asked = len(knowing.prompts)
    code, out, _ = suite("--tasks", "gsm8k", "--data-dir", data, "--limit", 1, "--overwrite", "--json")
    assert code == 0 and table(out)["GSM8K"]["samples"] == 1 and len(knowing.prompts) == asked + 1


def test_instruct_prompts_are_messages(suite, knowing, data):
    (data / "qwen2_jax_humaneval").rename(data / "qwen2_jax_humaneval_instruct")
    code, out, err = suite(
        *("--tasks", "gsm8k", "humaneval", "--data-dir", data, "--allow-code-execution", "--json"),
        *("--system-prompt", "Be brief."),
        name="qwen2-instruct",
    )
    assert code == 0, err
    assert table(out)["HumanEval"]["score"] == 50.0 and table(out)["GSM8K"]["score"] == 50.0
    assert all(prompt.startswith("<system>Be brief.<user>") for prompt in knowing.prompts)
    coding = [prompt for prompt in knowing.prompts if "def add" in prompt]
    assert all(prompt.count("```python\ndef add") == 2 for prompt in coding)  # asked for, and begun


def test_programs_that_could_not_be_run_are_named(suite, knowing, data, monkeypatch):
    from qwen2_jax.evaluation.sandbox import Outcome
    from qwen2_jax.evaluation.tasks import programs

    lost = Outcome("could not run", "no memory")
    monkeypatch.setattr(programs, "run_program", lambda program: lost)
    code, out, err = suite("--tasks", "humaneval", "--data-dir", data, "--allow-code-execution", "--json")
    assert code == 0, err
    assert table(out)["HumanEval"]["note"].startswith("2 samples could not be run: HumanEval/0: no memory; HumanEval/1")


def test_tasks_that_make_their_prompts_get_the_length(suite, knowing, monkeypatch, model):
    given = {}

    def evaluate_tasks(model, tasks, *, include_path, **_):
        given[tasks[0]] = [(path, *Path(path).glob("*.yaml")) for path in include_path]
        given["definition"] = (Path(include_path[1]) / "niah_single_2.yaml").read_text()
        raise ValueError("seen")

    monkeypatch.setattr(evaluate_suite, "evaluate_tasks", evaluate_tasks)
    code, _, err = suite("--tasks", "niah-8k", name="long-context")
    assert code == 2 and "seen" in err and knowing.seen == [8192]
    assert "max_seq_lengths:\n  - 8192" in given["definition"] and f"tokenizer: {model}" in given["definition"]


def test_of_several_processes_only_the_first_writes(suite, knowing, data, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_suite, "evaluate_tasks", lambda *_, **__: {})  # what the harness gives to the others
    assert suite("--tasks", "gsm8k", "--data-dir", data, "--process", 1)[:2] == (0, "")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_real_model_is_measured(suite, data, monkeypatch):
    code, out, err = suite("--tasks", "hellaswag", "gsm8k", "--data-dir", data, "--limit", 1, "--json")
    assert code == 0, err
    rows = table(out)
    assert rows["HellaSwag"]["samples"] == 1 and rows["HellaSwag"]["score"] in (0.0, 100.0)
    assert "leaves no room for a prompt" in rows["GSM8K"]["note"]  # this model sees 128 tokens


@pytest.mark.parametrize("name", ["qwen2-base", "qwen2-instruct", "long-context"])
def test_a_suite_is_listed_without_a_model(suite, name):
    code, out, _ = suite("--list", name=name)
    assert code == 0 and "no task" in out and "report: " in out
    code, out, _ = suite("--list", "--json", name=name)
    assert code == 0 and json.loads(out)["suite"] == name


@pytest.mark.parametrize(
    ("argv", "because"),
    [
        (["--tasks", "helaswag"], "did you mean hellaswag?"),
        (["--tasks", "theoremqa"], "TheoremQA cannot be run"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--data-dir", "nowhere"], "--data-dir nowhere is not a folder"),
        (["--system-prompt", "x"], "--system-prompt changes nothing in qwen2-base"),
    ],
)
def test_mistakes_get_one_line(suite, knowing, argv, because):
    code, out, err = suite(*argv)
    assert (code, out) == (2, "") and because in err and err.count("\n") == 1


def test_a_model_and_a_folder_must_be_given(capsys):
    for argv, missing in ((["qwen2-base"], "--model and --out"), (["qwen2-base", "--model", "x"], "--out must")):
        options = parse(evaluate_suite.Options, argv, prog="qwen2-jax evaluate suite")
        assert exit_code(lambda options=options: evaluate_suite.run(options)) == 2
        assert missing in capsys.readouterr().err


def test_a_missing_suite_or_checkpoint_is_named(suite, tmp_path):
    code, _, err = suite(name="qwen2-bse")
    assert code == 2 and "did you mean qwen2-base" in err
    code, _, err = suite(model=tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err


def test_the_code_tasks_are_in_the_folder():
    names = {path.name for path in TASKS_FOLDER.glob("*.yaml")}
    assert names == {"humaneval.yaml", "humaneval_instruct.yaml", "mbpp.yaml", "mbpp_instruct.yaml"}
