"""The harness's tasks by name, whose thousands of files a process reads once."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any


@functools.cache
def _shipped() -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def task_manager(include_path: Sequence[str] = ()) -> Any:
    """The harness's `TaskManager` for its own tasks and those of folders, which replace earlier ones of the same name.
    Made by its constructor, each takes seconds, here the first one does.

    Only `load` and `task_index` know all tasks; `all_tasks` and `match_tasks` are of the folders alone.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(include_path) or None, include_defaults=False)
    manager.task_index.update({**_shipped(), **manager.task_index})
    return manager
