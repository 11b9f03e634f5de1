"""Tables in Markdown that are what the commands beside them print now: `python -m sharding.planner.documents FILE ...`.

A block stands between two comments and begins with its commands, in a fence. A search gives its table, one plan its
memory and time, several plans a line each.
"""

import re
import shlex
import sys
from pathlib import Path

from qwen2_jax.command import exit_code, parse
from sharding.cli import TOP, Options, plan, ranked
from sharding.planner import report
from sharding.planner.report import Sheet

_BEGIN = "<!-- plans: begin; written by python -m sharding.planner.documents -->"
_END = "<!-- plans: end -->"
_BLOCK = re.compile(re.escape(_BEGIN) + r"\n\n```sh\n(.*?)```\n.*?" + re.escape(_END), re.DOTALL)


def rewritten(text: str) -> str:
    """A document with every block's tables made anew.

    Raises:
      ValueError: for a command that is not one of `qwen2-jax plan`, or fails.
    """
    return _BLOCK.sub(lambda block: _block(block[1]), text)


def _block(commands: str) -> str:
    tables = "\n\n".join(_tables([_options(line) for line in commands.splitlines() if line]))
    return f"{_BEGIN}\n\n```sh\n{commands}```\n\n{tables}\n\n{_END}"


def _options(line: str) -> Options:
    program, job, *argv = shlex.split(line)
    if (program, job) != ("qwen2-jax", "plan"):
        raise ValueError(f"expected a line of `qwen2-jax plan`, got {line!r}")
    options: Options = parse(Options, argv, prog="qwen2-jax plan")
    return options


def _tables(every: list[Options]) -> list[str]:
    if len(every) > 1:
        return [_markdown(report.summary_sheet([plan(options) for options in every]))]
    (options,) = every
    if options.search:
        return [_markdown(report.search_sheet(ranked(options)[: options.top or TOP]))]
    result = plan(options)
    sheets = report.memory_sheet(result), report.time_sheet(result)
    return [*map(_markdown, sheets), " ".join(report.verdict(result))]


def _markdown(sheet: Sheet) -> str:
    rule = ("---", *["---:"] * (len(sheet.columns) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (sheet.columns, rule, *sheet.rows))


def _run(paths: list[str]) -> None:
    for path in map(Path, paths):
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: _run(sys.argv[1:])))
