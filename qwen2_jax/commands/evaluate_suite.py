"""`qwen2-jax evaluate suite`: the benchmarks of Qwen2's report, with its scores beside."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from convert.files import write_whole
from qwen2_jax.command import interrupt_by_exception
from qwen2_jax.commands.evaluation import EvaluationOptions, aligned, fingerprint, open_journal, open_session
from qwen2_jax.commands.harness import (
    HarnessOptions,
    evaluate_tasks,
    open_model,
    require_harness,
    set_flags,
    show_run,
)
from qwen2_jax.commands.processes import join, of_first
from qwen2_jax.evaluation.suites import (
    SIZES,
    SUITES,
    TASKS_FOLDER,
    Suite,
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
from qwen2_jax.json_object import printable, read_json_object

NAME = "suite"

_NO_SETTINGS = ("mesh", "batch_size", "xla_flags", "together")  # how fast, not what
_REASON = 400  # characters of an error in the table
_FETCHING = ("datasets", "huggingface_hub", "requests", "httpx", "fsspec", "aiohttp")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure a model on the benchmarks of Qwen2's report, with the report's score of the same size beside.

    Suites are qwen2-base, qwen2-instruct and long-context; --list shows what is in one, and what differs from the
    report. Writes FOLDER/suite.json and FOLDER/suite.md; each task's result is in FOLDER/tasks as soon as it is
    finished.
    """

    suite: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SUITE")]
    """qwen2-base, qwen2-instruct or long-context."""
    harness: Annotated[HarnessOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: HarnessOptions(model="")
    )
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where the results go. An interrupted run goes on with the same command."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = ()
    """Only these of the suite, by the names that --list shows."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Only the first N samples of each task (of a group: of each of its tasks)."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Local data: DIR/TASK/SPLIT.jsonl or .parquet replaces what the harness would download for a task."""
    system_prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The system message of a suite that chats; the chat template has one of its own."""
    allow_code_execution: bool = False
    """Run the programs that the model writes for HumanEval and MBPP; docs/evaluation.md says what holds them."""
    list: bool = False
    """Show what is in the suite, and run nothing."""
    overwrite: bool = False
    """Begin anew, even if the folder holds results."""
    json: bool = False
    """Print the table as one JSON object, and nothing else."""


def run(options: Options) -> int:
    suite = find_suite(options.suite)
    chosen = pick_tasks(suite, options.tasks)
    if options.list:
        return _list(suite, options.json)
    out = _checked(options, suite)
    set_flags(options.harness.xla_flags)
    require_harness()
    interrupt_by_exception()  # programs under test end with this one, and what it put into the temporary folder goes
    model = EvaluationOptions(model=options.harness.model, out=out, overwrite=options.overwrite)
    session = open_session(model)
    settings = _settings(options, suite, fingerprint(session.folder))
    first = join(options.harness.together)  # of several processes, which writes; the others leave the folder alone
    show_run(first)
    with open_journal(NAME, model, settings) if first else contextlib.nullcontext():  # keeps other runs out
        if first and options.overwrite:
            for name in ("tasks", "cache", "errors"):
                shutil.rmtree(out / name, ignore_errors=True)
        job = _Job(options, suite, out, session.folder, settings, first)
        job.run(chosen)
        if not first:
            return 0
        size = published_size(session.config)
        rows = result_rows(suite.tasks, job.records, job.notes, size)
        _publish(options, suite, out, settings, rows, size, job.usage)
    if not any(task.key in job.records for task in chosen):
        reasons = [f"{task.name}: {job.notes[task.key]}" for task in chosen if task.key in job.notes]
        raise ValueError(f"none of {len(reasons)} tasks could be run; {reasons[0]}")
    return 0


def _checked(options: Options, suite: Suite) -> Path:
    if options.out is None or not options.harness.model:
        flags = [name for name, given in (("--model", options.harness.model), ("--out", options.out)) if not given]
        raise ValueError(f"{' and '.join(flags)} must be given, unless --list only shows the suite")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise ValueError(f"--data-dir {options.data_dir} is not a folder")
    if options.system_prompt is not None and not suite.chat:
        raise ValueError(f"--system-prompt changes nothing in {suite.name}, whose prompts are no messages")
    return options.out


def _settings(options: Options, suite: Suite, weights: str) -> dict[str, Any]:
    model = {name: value for name, value in dataclasses.asdict(options.harness).items() if name not in _NO_SETTINGS}
    return {
        **json.loads(json.dumps(model, default=str)),
        "weights": weights,
        "suite": suite.name,
        "limit": options.limit,
        "system_prompt": options.system_prompt,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


class _Job:
    """The tasks of one run, and what became of them."""

    def __init__(
        self, options: Options, suite: Suite, out: Path, folder: Path, settings: Mapping[str, Any], first: bool
    ):
        self._options, self._suite, self._out, self._folder, self._first = options, suite, out, folder, first
        self._settings = settings
        self._cache = out / "cache" / _digest(settings)[:16]
        self.records: dict[str, dict[str, Any]] = {}
        """Of the tasks that are finished, by key, those of earlier runs too."""
        self.notes: dict[str, str] = {}
        """Why others are not."""
        self.usage: dict[str, Any] | None = None
        """What this run took, if it ran anything."""
        # With --overwrite the first process removes the files, and the others need not see it.
        for task in () if options.overwrite else suite.runnable:
            if self._file(task).is_file():
                record = read_json_object(self._file(task))
                if record.get("settings") == self._settings_of(task):
                    self.records[task.key] = record

    def run(self, chosen: Sequence[SuiteTask]) -> None:
        """Runs what is left of `chosen`, one task after the other."""
        left = []
        for task in self._suite.runnable:
            if task.key in self.records:
                continue
            if task not in chosen:
                other = "; what is there of it is of other settings or data" if self._file(task).is_file() else ""
                self.notes[task.key] = f"not asked for{other}"
            elif task.runs_code and not self._options.allow_code_execution:
                self.notes[task.key] = "runs programs that the model writes; --allow-code-execution lets it"
            else:
                left.append(task)
        wanted = of_first([task in left for task in self._suite.runnable])
        left = [task for task, is_wanted in zip(self._suite.runnable, wanted, strict=True) if is_wanted]
        if not left:
            return
        model = open_model(self._options.harness)
        from sharding.processes import leave_processes

        with tempfile.TemporaryDirectory(prefix="qwen2-jax-suite-") as definitions:
            for task in left:
                self._run(task, model, Path(definitions))
        self.usage = model.usage()
        leave_processes()
        for key in self.records:
            shutil.rmtree(self._cache / key, ignore_errors=True)

    def _file(self, task: SuiteTask) -> Path:
        return self._out / "tasks" / f"{task.key}.json"

    def _settings_of(self, task: SuiteTask) -> str:
        """Changes with all that a task's score depends on, the local data that it reads included."""
        from qwen2_jax.evaluation.local_data import digest

        assert task.harness is not None
        data = None if self._options.data_dir is None else digest(self._options.data_dir, task.harness)
        return _digest({**self._settings, "data": data})

    def _run(self, task: SuiteTask, model: Any, definitions: Path) -> None:
        start = time.monotonic()
        truncated = model.usage()["truncated"]
        trace = self._out / "errors" / f"{task.key}.txt"
        try:
            settings = self._settings_of(task)  # before its data are read
            results = self._evaluate(task, model, definitions / task.key)
            if not results:  # the harness gives them to the first process
                return
            record = read_score(task, results, model.usage()["truncated"] - truncated)
        except Exception as error:  # whatever the harness, a data set or a package in it comes up with
            self.notes[task.key] = _reason(error, task, self._options.data_dir)
            if self._first:
                self._say(f"{task.name}: {self.notes[task.key]}")
                _write(trace, traceback.format_exc())
            return
        record |= {"data": results["data"], "seconds": round(time.monotonic() - start, 3), "settings": settings}
        _write(self._file(task), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        self.records[task.key] = record
        trace.unlink(missing_ok=True)
        self._say(f"{task.name}: {record['score']:.1f}, {record['samples']} samples, {record['seconds']:.0f} s")

    def _evaluate(self, task: SuiteTask, model: Any, own: Path) -> dict[str, Any]:
        from qwen2_jax.evaluation.local_data import define, leaf_tasks, read_from

        assert task.harness is not None
        options, local = self._options, False
        model.see(prompts_of=task.length)
        if task.length is not None:  # the harness makes prompts of this length, in tokens of this model
            metadata = {**leaf_tasks(task.harness)[task.harness]["metadata"], "max_seq_lengths": [task.length]}
            define(task.harness, own, metadata={**metadata, "tokenizer": str(self._folder)})
        elif options.data_dir is not None:
            local = read_from(options.data_dir, task.harness, own)
        (self._cache / task.key).mkdir(parents=True, exist_ok=True)
        results = evaluate_tasks(
            model,
            [task.harness],
            shots=task.shots,
            limit=options.limit,
            chat=self._suite.chat,
            system_prompt=options.system_prompt,
            use_cache=str(self._cache / task.key / "answers"),
            allow_code=task.runs_code and options.allow_code_execution,
            include_path=[str(TASKS_FOLDER), *([str(own)] if own.is_dir() else [])],
        )
        return {**results, "data": str(options.data_dir) if local else "the harness's source"} if results else {}

    def _say(self, line: str) -> None:
        if not self._options.json:
            print(line, file=sys.stderr, flush=True)


def _reason(error: Exception, task: SuiteTask, data_dir: Path | None) -> str:
    """One line for the table; the traceback is in a file of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(lines[0] if lines else type(error).__name__)
    text = text if len(text) <= _REASON else f"{text[: _REASON - 3]}..."
    if text.startswith("Sample larger than population"):  # what random.sample says, far inside the harness
        text = f"its data have fewer than {task.shots} examples for a prompt"
    elif not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    if type(error).__module__.partition(".")[0] in _FETCHING or isinstance(error, ConnectionError):
        where = "--data-dir DIR" if data_dir is None else str(data_dir)
        text = f"no data: {text}; connect to the Hugging Face Hub, or put files into {_folders(task)} of {where}"
    return text


def _folders(task: SuiteTask) -> str:
    """Which folders the data of a task may be in."""
    from qwen2_jax.evaluation.local_data import leaf_tasks

    assert task.harness is not None
    names = sorted(leaf_tasks(task.harness))
    return f"the folder {names[0]}" if len(names) == 1 else f"the {len(names)} folders {names[0]}, {names[1]}, ..."


def _publish(
    options: Options,
    suite: Suite,
    out: Path,
    settings: Mapping[str, Any],
    rows: list[dict[str, Any]],
    size: str | None,
    usage: dict[str, Any] | None,
) -> None:
    report = {
        "suite": suite.name,
        "title": suite.title,
        "model": options.harness.model,
        "settings": settings,
        "size": size,
        "table": rows,
        "usage": usage,
    }
    _write(out / "suite.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    compared = "no size of the report" if size is None else f"compared with Qwen2-{size.upper()}"
    title = f"{options.harness.model}: {suite.name} ({suite.title}), {compared}"
    if options.limit is not None:
        title += f"; only {options.limit} samples of each task, so no scores to quote"
    _write(out / "suite.md", markdown(title, rows, size))
    if options.json:
        print(json.dumps({"size": size, "table": rows, "usage": usage}))
    else:
        cells = [[*line[:-1], ""] for line in plain_cells(rows, size)]
        notes = [line[-1] for line in plain_cells(rows, size)]
        table = aligned(cells).splitlines()
        print("\n".join(f"{line}{note}".rstrip() for line, note in zip(table, notes, strict=True)))
        if usage is not None:
            from qwen2_jax.plugins.lm_eval import usage_line

            print(usage_line(usage))
        print(f"written: {out / 'suite.json'} and {out / 'suite.md'}")


def _list(suite: Suite, as_json: bool) -> int:
    rows = definition_rows(suite)
    if as_json:
        print(json.dumps({"suite": suite.name, "sizes": SIZES, "tasks": rows}))
        return 0
    print(f"{suite.name}: {suite.title}\n")
    for row in rows:
        task = "no task" if row["task"] is None else f"{row['task']} v{row['version']}, {row['shots']} examples"
        report = ", ".join(f"{size} {score}" for size, score in row["report"].items()) or "no score"
        print(f"{row['name']}: {task}{', runs programs' if row['runs_code'] else ''}")
        print(f"    {row['differs']}\n    report: {report}")
    print(f"\nother suites: {', '.join(name for name in SUITES if name != suite.name)}")
    return 0


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
