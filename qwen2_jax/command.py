"""How every command ends: 0 done, 2 for what the user can mend (one line on standard error), 1 for our bugs."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def exit_code(run: Callable[[], int | None]) -> int:
    """Runs a command and turns how it ended into the status that the process should exit with."""
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python's last flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (ValueError, OSError) as error:
        print(f"qwen2-jax: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + 2
    except Exception:
        traceback.print_exc()
        return 1


def parse(options: Any, argv: Sequence[str], prog: str) -> Any:
    """The command line as an instance of the dataclass `options`, or of one in a union; `--help` prints and exits.

    Raises:
      ValueError: for a command line that `options` does not allow.
    """
    import tyro

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                options, args=argv, prog=prog, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
    raise ValueError(_unboxed(printed.getvalue()))


def _unboxed(text: str) -> str:
    """What tyro complains about, without the frame (drawn in Unicode or ASCII) and the help of options around it."""
    lines = "\n".join(line.strip("│╰╯ ") for line in text.splitlines())
    title, *sections = (section.strip() for section in re.split(r"[─-]{4,}╮?", lines))
    complaints = [section.partition("\n\n")[0] for section in sections[:1]] or [title]
    for section in sections[1:]:
        if section.startswith("Unrecognized"):
            complaints.append(section)
        elif section.startswith("Perhaps you meant"):
            meant = dict.fromkeys(re.findall(r"^--[\w-]+", section, re.MULTILINE))
            complaints.append(f"perhaps you meant {' or '.join(meant)}")
    return "; ".join(complaints)


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__
