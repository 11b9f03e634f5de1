"""The options of a run from the command line, and from run files (YAML) and presets, which have the same names."""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from convert.files import expanded
from qwen2_jax.command import parse
from train.run import Phase, Run

PROG = "qwen2-jax train pretrain"
_LISTS = ("data", "weights", "validation_data", "profile")
_PRESETS = resources.files("train") / "presets"


def read_run(argv: Sequence[str]) -> Run:
    """The run that a command line asks for, its first argument being a run file, or flags only.

    Raises:
      OSError: if the run file cannot be read.
      ValueError: for an option that does not exist, or has no such value, in the file or on the command line.
    """
    if not argv or argv[0].startswith("-"):
        run: Run = parse(Run, argv, prog=PROG)
        if run.file is not None:
            raise ValueError(f"a run file comes first, as in {PROG} {run.file} --out RUN; it stands behind options")
        return _at_home(run)
    name, *flags = argv
    options = _read_file(_locate(name))
    for here, there in (("--init", "model"), ("--model", "init")):  # either says what to start from
        if any(flag.partition("=")[0] == here for flag in flags):
            options.pop(there, None)
    entries = options.pop("phases", None) or []
    if not isinstance(entries, list):
        raise ValueError(f"{name}: phases is a list of tables, as - {{steps: 1000, seq: 32768}}; got {entries!r}")
    if entries and ("steps" in options or any(flag.partition("=")[0] == "--steps" for flag in flags)):
        raise ValueError(f"{name} lists phases, which have steps of their own; --steps does not go with them")
    phases = tuple(_phase(name, number, entry) for number, entry in enumerate(entries, 1))
    run = parse(Run, [name, *_as_flags(name, options), *flags], prog=PROG)
    return _at_home(dataclasses.replace(run, phases=phases))


def _at_home(run: Run) -> Run:
    """The run with its folders as they are used: no shell replaces the ~ of a run file, or of --out=~/runs."""
    out, cache, programs = run.out, run.text.cache, run.compute.compilation_cache
    if out is not None and (url := re.match(r"([a-z][a-z0-9+.-]+):/", str(out), re.IGNORECASE)):  # a Path has one slash
        raise ValueError(
            f"--out {url[1]}://{str(out)[url.end() :]}: a run needs a folder that all its processes see; mount the "
            "bucket, for example with gcsfuse, and name the folder"
        )
    if programs is not None and "://" not in programs:  # JAX writes to buckets by itself
        programs = str(expanded(programs))
    return dataclasses.replace(
        run,
        out=None if out is None else expanded(out),
        text=dataclasses.replace(run.text, cache=None if cache is None else expanded(cache)),
        compute=dataclasses.replace(run.compute, compilation_cache=programs),
    )


def as_options(run: Run) -> dict[str, Any]:
    """The options of a run by name, as a run file has them, defaults included."""
    options: dict[str, Any] = {}
    for name, value in dataclasses.asdict(run).items():
        options |= value if isinstance(value, dict) else {name: value}
    options["phases"] = [
        {name: value for name, value in phase.items() if value is not None} for phase in options["phases"]
    ]
    for name in ("file", "steps") if run.phases else ("file",):
        del options[name]
    return json.loads(json.dumps(options, default=str))  # paths as texts, and nothing but lists


def presets() -> list[str]:
    """The names of the run files that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _PRESETS.iterdir() if file.name.endswith(".yaml"))


def _locate(name: str) -> Any:
    if Path(name).suffix in (".yaml", ".yml") or Path(name).exists():
        return Path(name)
    if name in presets():
        return _PRESETS / f"{name}.yaml"
    near = difflib.get_close_matches(name, presets()) or presets()
    raise ValueError(f"{name} is neither a run file (NAME.yaml) nor a preset; presets like it: {', '.join(near)}")


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands there twice: YAML itself takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{', '.join(twice)} given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Any) -> Any:
    """What a file of YAML holds.

    Raises:
      yaml.YAMLError: for anything else; also for names given twice, dates that there are not, and text not in UTF-8.
      OSError: if it cannot be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None


def _read_file(path: Any) -> dict[str, Any]:
    try:
        options = load_yaml(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(options, dict) or not options or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{path} holds no options; a run file has lines such as learning_rate: 3e-4")
    return options


def _as_flags(file: str, options: Mapping[str, Any]) -> list[str]:
    known = as_options(Run())
    flags = []
    for name, value in options.items():
        if name not in known:
            raise ValueError(_unknown(f"{file}: there is no option {name}", name, known))
        if isinstance(value, dict):
            raise ValueError(f"{file}: {name} must be a value or a list, got a table")
        if isinstance(known[name], bool) != isinstance(value, bool) and value is not None:
            expected = "true or false" if isinstance(known[name], bool) else "a value; a word such as yes needs quotes"
            raise ValueError(f"{file}: {name} must be {expected}, got {value!r}")
        if isinstance(value, list) and name not in _LISTS:
            raise ValueError(f"{file}: {name} must be one value, got {value!r}")
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def _phase(file: str, number: int, entry: Any) -> Phase:
    known = {field.name: field for field in dataclasses.fields(Phase)}
    where = f"{file}: phase {number}"
    if not isinstance(entry, dict) or "steps" not in entry:
        raise ValueError(f"{where} must have steps, and may have {', '.join(known)}; got {entry!r}")
    flags = []
    for name, value in entry.items():
        if name not in known:
            raise ValueError(_unknown(f"{where} has an option {name} that no phase has", name, known))
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    try:
        return parse(Phase, flags, prog=PROG)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _unknown(complaint: str, name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), known)
    return f"{complaint}; did you mean {' or '.join(near)}?" if near else f"{complaint}; see {PROG} --help"
