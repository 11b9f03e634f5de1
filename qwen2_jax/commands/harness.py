"""What the evaluations by lm-evaluation-harness share: the model's options, and one call of the harness."""

import dataclasses
import difflib
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qwen2_jax.commands.session import Attention, Mesh, attention_option
from qwen2_jax.json_object import brief
from qwen2_jax.long_context import LongContext

if TYPE_CHECKING:  # only: the options and their help must not wait for JAX
    from qwen2_jax.plugins.lm_eval import Qwen2JaxLM

Number = tyro.conf.arg(metavar="N", help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """For runs of several processes on clusters that JAX does not know by itself."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """A free port of the first process."""
    processes: Annotated[int | None, Number] = None
    """How many there are."""
    process: Annotated[int | None, Number] = None
    """Which one this is, from 0."""


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    model: Annotated[str, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """Folder of a checkpoint, ours or Hugging Face's, of a step of a training run, or a hub id such as Qwen/Qwen2-0.5B
    (downloaded)."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: as stored)"),
    ] = None
    """Of weights and arithmetic."""
    attention: Annotated[Attention | None, attention_option()] = None
    """How attention over a prompt is computed; cudnn needs an NVIDIA GPU, pallas is for TPUs."""
    mesh: Mesh = None
    """Spread the model over all devices, as in data=2,tensor=4; axes: data, fsdp, expert, context, tensor. -1 for one
    of them stands for all that are left."""
    max_length: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: max_position_embeddings)")
    ] = None
    """Most tokens that the model sees at once; longer inputs lose their beginning, and are counted."""
    batch_size: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: what memory allows)")
    ] = None
    """Most rows of a batch."""
    long_context: Annotated[LongContext, tyro.conf.arg(name="")] = dataclasses.field(default_factory=LongContext)
    together: Annotated[ProcessOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ProcessOptions)


def require_harness() -> None:
    """
    Raises:
      ValueError: if lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm-evaluation-harness is not installed; pip install "qwen2-jax[eval]"')


def join(options: ProcessOptions) -> bool:
    """Joins the other processes of this run, if there are any; must come before anything that asks JAX for devices.

    Returns:
      Whether this is the first process, which alone writes.

    Raises:
      ValueError: for options that do not belong together.
    """
    import jax

    from sharding.processes import join_processes

    join_processes(**dataclasses.asdict(options))
    return jax.process_index() == 0


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


def check_tasks(names: Sequence[str], include_path: Sequence[str] = ()) -> Any:
    """The harness's index of tasks, if it knows each of `names`: a task, group or tag, a pattern, or a YAML file.

    Raises:
      ValueError: for one that it does not know, with the nearest that it does.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(include_path) or None)
    for name in names:
        if name.endswith(".yaml"):
            if not Path(name).is_file():
                raise ValueError(f"there is no task file {name}")
        elif not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            also = f"; did you mean {' or '.join(near)}?" if near else "; `lm_eval ls tasks` lists them"
            raise ValueError(f"the harness has no task {brief(name)}{also}")
    return manager


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
    manager = check_tasks(names, include_path)
    chosen: list[Any] = [task for task in tasks if not isinstance(task, str)]
    for name in names:
        chosen += [name] if name.endswith(".yaml") else manager.match_tasks([name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that read data
        warnings.simplefilter("ignore", FutureWarning)
        results = simple_evaluate(
            model=model,
            tasks=chosen,
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
    return dict(results) if results is not None else {}


def quiet_harness() -> None:
    """Leaves warnings of the harness's many, so that what happens to this run can be seen."""
    for name in ("lm_eval", "datasets", "evaluate", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
