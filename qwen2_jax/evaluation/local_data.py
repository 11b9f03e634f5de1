"""Tasks of the harness on local files: definitions that include the harness's own and name other data."""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen2_jax.evaluation.suites import TASKS_FOLDER
from qwen2_jax.evaluation.task_index import task_manager

_LOADERS = {".jsonl": "json", ".parquet": "parquet"}


def read_from(data_dir: Path, task: str, folder: Path) -> bool:
    """Defines a task, or every task of a group, anew, with data from `data_dir`.

    The data of a task are the files SPLIT.jsonl or SPLIT.parquet in the folder that has the task's name; SPLIT is what
    the task's definition calls it (test, validation, train, dev, ...).

    Args:
      data_dir: holds a folder for each task.
      task: of the harness or of TASKS_FOLDER.
      folder: where the definitions go; name it to the harness as `include_path`, after TASKS_FOLDER.

    Returns:
      Whether there are local data: without any folder for it, a task keeps its own.

    Raises:
      ValueError: if data are there for a part of a group only, a split is missing, or a file is empty.
      OSError: if a file cannot be read or written.
    """
    leaves = _readers(task)
    if not any((data_dir / leaf).is_dir() for leaf in leaves):
        return False
    if missing := [leaf for leaf in leaves if not (data_dir / leaf).is_dir()]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{data_dir} has data for a part of {task} only; there is no folder {shown}")
    for leaf in leaves:
        loader, files = _files(data_dir / leaf)
        config = leaf_tasks(leaf)[leaf]
        if lacking := [split for split in _splits(config) if split not in files]:
            raise ValueError(
                f"{data_dir / leaf} has no {' and no '.join(f'{split}.jsonl or .parquet' for split in lacking)}, which "
                f"{leaf} reads; it has {', '.join(sorted(files)) or 'none'}"
            )
        define(leaf, folder, dataset_path=loader, dataset_name=None, dataset_kwargs={"data_files": files})
    return True


def digest(data_dir: Path, task: str) -> str | None:
    """Changes with what `read_from` would read; None if that is nothing.

    Raises:
      ValueError: if there is no such task.
      OSError: if a file cannot be read.
    """
    files = [
        path
        for leaf in _readers(task)
        if (data_dir / leaf).is_dir()
        for path in sorted((data_dir / leaf).iterdir())
        if path.suffix in _LOADERS
    ]
    if not files:
        return None
    content = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content.update(f"{path.relative_to(data_dir)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()


def define(task: str, folder: Path, **changes: Any) -> None:
    """Writes the definition of a task of the same name, with changes.

    Raises:
      OSError: if it cannot be written.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    definition = {"include": str(_index()[task].yaml_path), "task": task, **changes}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))


def leaf_tasks(task: str) -> dict[str, dict[str, Any]]:
    """The definitions of a task, or of the tasks of a group, by name; functions in them are only named.

    Raises:
      ValueError: if there is no such task.
    """
    if (entry := _index().get(task)) is None:
        raise ValueError(f"the installed harness has no task {task!r}")
    if entry.kind.name == "TAG":
        members: Iterable[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        members = entry.cfg["task"]
    else:
        return {task: entry.cfg}
    found: dict[str, dict[str, Any]] = {}
    for member in members:
        found |= leaf_tasks(member if isinstance(member, str) else member.get("task") or member["group"])
    return found


def _readers(task: str) -> list[str]:
    """The tasks that read data, of a task or group: others make theirs."""
    return [name for name, config in leaf_tasks(task).items() if config.get("custom_dataset") is None]


def _splits(config: Mapping[str, Any]) -> list[str]:
    """What a task reads: the split that is measured, and that of the examples, as the harness chooses them. It reads
    these even for prompts without examples."""
    measured = config.get("test_split") or config.get("validation_split")
    examples = config.get("fewshot_config") or {}
    source = examples.get("split") or config.get("fewshot_split")
    if not source and not examples.get("samples"):
        source = config.get("training_split") or config.get("validation_split")
    return list(dict.fromkeys(split for split in (measured, source) if split))


def _files(folder: Path) -> tuple[str, dict[str, str]]:
    files = sorted(path for path in folder.iterdir() if path.suffix in _LOADERS)
    kinds = {path.suffix for path in files}
    if len(kinds) > 1:
        raise ValueError(f"{folder} has .jsonl files and .parquet files; keep one kind")
    if not kinds:
        raise ValueError(f"{folder} has no .jsonl and no .parquet file")
    for path in files:
        if _is_empty(path):
            raise ValueError(f"{path} is empty")
    return _LOADERS[kinds.pop()], {path.stem: str(path.resolve()) for path in files}


def _is_empty(path: Path) -> bool:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return not any(line.strip() for line in file)
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.metadata.num_rows == 0


@functools.cache
def _index() -> Mapping[str, Any]:
    return task_manager([str(TASKS_FOLDER)]).task_index
