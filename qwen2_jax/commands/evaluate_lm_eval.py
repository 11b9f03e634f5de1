"""`qwen2-jax evaluate lm-eval`: any task of lm-evaluation-harness."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen2_jax.commands.evaluation import fingerprint
from qwen2_jax.commands.harness import (
    HarnessOptions,
    evaluate_tasks,
    find_tasks,
    open_model,
    require_harness,
    set_flags,
    show_run,
)
from qwen2_jax.commands.processes import join

NAME = "lm-eval"

_NO_SETTINGS = ("model", "mesh", "batch_size", "xla_flags", "together")  # where and how fast, not what


@dataclasses.dataclass(frozen=True)
class Options:
    """Run tasks of lm-evaluation-harness on a checkpoint.

    With --out, results and every sample are written as the harness writes them, and an interrupted run goes on with the
    same command: answers are kept in FOLDER/answers until the run is finished.
    """

    harness: Annotated[HarnessOptions, tyro.conf.arg(name="")]
    tasks: Annotated[str, tyro.conf.arg(metavar="TASK,...")]
    """Names, groups, patterns (mmlu_*) or YAML files; `lm_eval ls tasks` lists them."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: only printed)")] = None
    """Where results go."""
    num_fewshot: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each task's)")] = None
    """Examples before each question."""
    limit: Annotated[float | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Samples of each task, or a share of them if below 1; for trying things out, not for scores."""
    apply_chat_template: bool = False
    """Prompts are messages in the checkpoint's chat template."""
    fewshot_as_multiturn: bool = True
    """Examples are turns of the chat, rather than one message."""
    system_instruction: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """Before each prompt; the system message of a chat."""
    gen_kwargs: Annotated[str | None, tyro.conf.arg(metavar="NAME=X,...", help_behavior_hint="")] = None
    """Replace the tasks' own, as in temperature=0.7,do_sample=True."""
    include_path: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER ...", help_behavior_hint="")] = ()
    """Folders with more tasks."""
    allow_code_execution: bool = False
    """Let tasks run programs that the model writes, unprotected; those of `qwen2-jax evaluate suite` are protected."""
    json: bool = False
    """Print the results as one JSON object, and nothing else."""


def run(options: Options) -> int:
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    for flag, number in (("--num-fewshot", options.num_fewshot), ("--limit", options.limit)):
        if number is not None and (number < 0 or (number == 0 and flag == "--limit")):
            raise ValueError(f"{flag} must be {'above 0' if flag == '--limit' else '0 or more'}, got {number}")
    set_flags(options.harness.xla_flags)
    require_harness()
    from lm_eval.loggers import EvaluationTracker

    from sharding.processes import leave_processes

    find_tasks(names, options.include_path)  # before the weights are read
    tracker = EvaluationTracker(output_path=None if options.out is None else str(options.out))
    show_run(join(options.harness.together))
    model = open_model(options.harness)
    answers = None if options.out is None else _answers(options.out, options, model.session.folder)
    results = evaluate_tasks(
        model,
        names,
        shots=options.num_fewshot,
        limit=int(options.limit) if options.limit is not None and options.limit >= 1 else options.limit,
        chat=options.apply_chat_template,
        multiturn=options.fewshot_as_multiturn,
        system_prompt=options.system_instruction,
        generation=options.gen_kwargs,
        use_cache=None if answers is None else str(answers / "requests"),
        allow_code=options.allow_code_execution,
        include_path=options.include_path,
        tracker=tracker,
    )
    if results:
        _write(tracker, results)
        _publish(options, model, results)
    leave_processes()
    if results and answers is not None:
        shutil.rmtree(answers)
    return 0


def _answers(out: Path, options: Options, checkpoint: Path) -> Path:
    """A folder for the answers of this model, run in this way."""
    how = {name: value for name, value in dataclasses.asdict(options.harness).items() if name not in _NO_SETTINGS}
    settings = {**how, "gen_kwargs": options.gen_kwargs, "weights": fingerprint(checkpoint)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    folder = out / "answers" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(tracker: Any, results: dict[str, Any]) -> None:
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, of_task in samples.items():
        tracker.save_results_samples(task_name=name, samples=of_task)


def _publish(options: Options, model: Any, results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    from qwen2_jax.plugins.lm_eval import usage_line

    if options.json:
        report = {"results": results["results"], "usage": model.usage(), "skipped": results["skipped"]}
        print(json.dumps(report, default=str))
        return
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    print(usage_line({**model.usage(), "skipped": len(results["skipped"])}))
