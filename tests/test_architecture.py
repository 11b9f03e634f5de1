"""The rules of the house that a reader relies on, for every file of the four packages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "qwen2_jax": set(),
    "sharding": {"qwen2_jax"},
    "convert": {"qwen2_jax", "sharding"},
    "train": {"qwen2_jax", "sharding", "convert"},
}
FILES = sorted(path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def is_entry_point(path: Path) -> bool:
    """Commands and plug-ins bring the packages together, so they alone may import in any direction."""
    return path.name in ("__main__.py", "cli.py") or path.parts[1] in ("commands", "plugins")


def imported_packages(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports from the top-level package on"
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    package = path.parts[0]
    wrong = (imported_packages(path) & MAY_IMPORT.keys()) - MAY_IMPORT[package] - {package}
    assert is_entry_point(path) or not wrong, f"{package} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_finished(path):
    text = (ROOT / path).read_text()
    assert text.count("\n") <= 600
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").exists()
