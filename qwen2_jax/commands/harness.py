"""What the evaluations by lm-evaluation-harness share: the model's options, and one call of the harness."""

import contextlib
import dataclasses
import difflib
import fnmatch
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen2_jax import xla_flags
from qwen2_jax.commands.processes import ProcessOptions
from qwen2_jax.commands.session import Attention, Mesh, attention_option
from qwen2_jax.evaluation.suites import few
from qwen2_jax.evaluation.task_index import task_manager
from qwen2_jax.json_object import brief
from qwen2_jax.long_context import LongContext

if TYPE_CHECKING:  # only: the options and their help must not wait for JAX
    from qwen2_jax.plugins.lm_eval import Qwen2JaxLM

XlaFlags = Literal["recommended", "none"]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    model: Annotated[str, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """Checkpoint: a folder, ours or Hugging Face's, a step of a training run, or a hub id such as Qwen/Qwen2-0.5B."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: as stored)"),
    ] = None
    """Of weights and arithmetic."""
    attention: Annotated[Attention | None, attention_option()] = None
    """How attention over a prompt is computed; cudnn needs an NVIDIA GPU, pallas is for TPUs."""
    mesh: Mesh = None
    """Spread the model over all devices, as in data=2,tensor=4 (also fsdp, expert, context); -1 takes what is left."""
    max_length: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: max_position_embeddings)")
    ] = None
    """Most tokens that the model sees at once; longer inputs lose their beginning, and are counted."""
    batch_size: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: what memory allows)")
    ] = None
    """Most rows of a batch."""
    xla_flags: XlaFlags = "none"
    """What to set before JAX starts: what helps on the platform and this JAX knows (see qwen2_jax/xla_flags.py)."""
    long_context: Annotated[LongContext, tyro.conf.arg(name="")] = dataclasses.field(default_factory=LongContext)
    together: Annotated[ProcessOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ProcessOptions)


def set_flags(choice: XlaFlags) -> tuple[list[xla_flags.Setting], list[xla_flags.Setting]]:
    """Sets what `choice` says, before JAX is imported: what was set, and what this JAX does not know, which is said.

    Raises:
      ValueError: if JAX is imported already.
    """
    done, unknown = xla_flags.set_recommended() if choice == "recommended" else ([], [])
    for setting in unknown:
        print(f"not known to this JAX, left out: {setting}", file=sys.stderr, flush=True)
    return done, unknown


def require_harness() -> None:
    """
    Raises:
      ValueError: if lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm-evaluation-harness is not installed; pip install "qwen2-jax[eval]"')


def open_model(options: HarnessOptions) -> "Qwen2JaxLM":
    """The checkpoint as the harness calls it, weights loaded.

    Raises:
      OSError, ValueError: if the checkpoint is missing or damaged, or an option does not fit it.
    """
    from qwen2_jax.plugins.lm_eval import Qwen2JaxLM

    return Qwen2JaxLM(
        options.model,
        dtype=options.dtype,
        attention=options.attention,
        mesh=options.mesh,
        max_length=options.max_length,
        batch_size=options.batch_size,
        **dataclasses.asdict(options.long_context),
    )


def find_tasks(names: Sequence[str], include_path: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and what `names` stand for in it: each is a task, group or tag, a pattern, or a
    YAML file.

    Raises:
      ValueError: for one that it does not know, with the nearest that it does.
    """
    manager = task_manager(include_path)
    found = []
    for name in names:
        if name.endswith(".yaml"):
            if not Path(name).is_file():
                raise ValueError(f"there is no task file {name}")
            found.append(name)
        elif matches := sorted(fnmatch.filter(manager.task_index, name)):
            found += matches
        else:
            near = difflib.get_close_matches(name, manager.task_index, n=3)
            also = f"; did you mean {' or '.join(near)}?" if near else "; `lm_eval ls tasks` lists them"
            raise ValueError(f"the harness has no task {brief(name)}{also}")
    return manager, found


def evaluate_tasks(
    model: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    shots: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    multiturn: bool = True,
    system_prompt: str | None = None,
    generation: str | None = None,
    use_cache: str | None = None,
    allow_code: bool = False,
    include_path: Sequence[str] = (),
    samples: bool = True,
    tracker: Any = None,
) -> dict[str, Any]:
    """The harness's results for tasks, on a model of `open_model`; empty in all processes but the first.

    A sample that cannot be run, or whose answer the task fails to judge, does not end the run. It is named under
    "skipped" in what is returned; metrics that are means of what is better the higher it is count it as 0, and the
    others leave it out.

    Args:
      model: any model of the harness.
      tasks: names, or definitions.
      shots: examples before each question; the tasks' own number by default.
      limit: samples of each task, or a share of them if below 1; all by default.
      chat: whether prompts are messages in the checkpoint's chat template.
      multiturn: whether examples are turns of the chat.
      system_prompt: before each prompt.
      generation: arguments of generation that replace the tasks', as in "temperature=0.7,do_sample=True".
      use_cache: path of a file of answers, which an interrupted run finds again.
      allow_code: whether tasks may run programs that the model writes.
      include_path: folders with more tasks.
      samples: whether every sample's answer is among the results.
      tracker: the harness's, which writes files.

    Raises:
      ValueError: for unknown tasks, or tasks without samples.
      Exception: whatever the harness, or a data set, comes up with.
    """
    from lm_eval import simple_evaluate

    names = [task for task in tasks if isinstance(task, str)]
    index, chosen = find_tasks(names, include_path)
    manager = _Forgiving(index)
    before = len(getattr(model, "skipped", ()))
    # The harness prints how its standard errors come along, where results are to stand.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that read data
        warnings.simplefilter("ignore", FutureWarning)
        results = simple_evaluate(
            model=model,
            tasks=[*(task for task in tasks if not isinstance(task, str)), *chosen],
            num_fewshot=shots,
            use_cache=use_cache,
            limit=limit,
            log_samples=samples,
            evaluation_tracker=tracker,
            system_instruction=system_prompt,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat and multiturn,
            gen_kwargs=generation,
            task_manager=manager,
            confirm_run_unsafe_code=allow_code,
        )
    if results is None:
        return {}
    if manager.failed:
        _logger.warning("%d samples could not be judged: %s", len(manager.failed), few(manager.failed))
    return {**results, "skipped": [*getattr(model, "skipped", ())[before:], *manager.failed]}


class _Forgiving:
    """The harness's index of tasks, whose tasks go on after a sample that they fail to judge."""

    def __init__(self, manager: Any):
        self._manager = manager
        self.failed: list[str] = []
        """Names of such samples, with the error."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def load(self, tasks: Any) -> Any:
        try:
            loaded = self._manager.load(tasks)
        except StopIteration:  # the way that a file without a line ends in the package that reads data
            names = few([str(task) for task in tasks])
            raise ValueError(f"a data file is empty, one of those that {names} reads") from None
        for name, task in loaded["tasks"].items():
            task.process_results = self._guarded(name, task)
        return loaded

    def _guarded(self, name: str, task: Any) -> Callable[[Any, Any], Mapping[str, Any]]:
        from lm_eval.api.metrics import mean

        process_results = task.process_results
        better = task.higher_is_better()
        worst = {metric: 0.0 for metric, how in task.aggregation().items() if how is mean and better.get(metric)}
        calls = 0

        def guarded(doc: Any, results: Any) -> Mapping[str, Any]:
            nonlocal calls
            # The harness comes once for each document, in order, and then again for each further filter.
            documents = len({request.doc_id for request in task.instances})
            document, calls = calls % documents, calls + 1
            try:
                return process_results(doc, results)
            except ImportError:  # no fault of the sample
                raise
            except Exception as error:  # whatever a task comes up with
                sample = f"{name}, document {document}: {type(error).__name__}: {brief(str(error))}"
                if sample not in self.failed:
                    self.failed.append(sample)
                return worst

        return guarded


def show_run(first: bool) -> None:
    """Lets the first process's lines about memory and speed appear on standard error, and its warnings; of the
    harness's many messages, only errors."""
    for name in ("lm_eval", "datasets", "evaluate", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = logging.getLogger("qwen2_jax")
    ours.setLevel(logging.INFO if first else logging.ERROR)
    if not any(isinstance(handler, _Lines) for handler in ours.handlers):
        ours.addHandler(_Lines())


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)
