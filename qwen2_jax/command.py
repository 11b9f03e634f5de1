"""How every command ends: 0 done, 2 for what the user can mend (one line on standard error), 1 for our bugs."""

import contextlib
import io
import opcode
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qwen2_jax.json_object import printable

INTERRUPTED = 128 + signal.SIGINT
_READER_GONE = 128 + signal.SIGPIPE

_PACKAGES = ("qwen2_jax", "sharding", "convert", "train", "benchmarks")
_HEAD, _TAIL = 900, 300  # characters of a message that is too long; its end often says what to do


def exit_code(run: Callable[[], int | None]) -> int:
    """Runs a command and turns how it ended into the status that the process should exit with."""
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        return _READER_GONE
    except Exception as error:
        line = _complaint(error)
        _say(traceback.format_exc() if line is None else f"qwen2-jax: error: {_one_line(line)}\n")
        return 1 if line is None else 2
    finally:
        _settle(sys.stdout)
        _settle(sys.stderr)


def prepare_process() -> None:
    """Gives a process that is a command what it may lack: standard streams, and a way to write any character."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the caller (`>&-`): the next file opened would take its place, and our output
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_stdout() -> None:
    """Leaves standard output to what Python prints; what other libraries print goes to standard error from here on.

    Those that move arrays between processes (Gloo; NCCL when asked) print to the descriptor itself, from several
    threads at once: a reader of our JSON cannot tell their pieces apart.
    """
    sys.stdout.flush()
    assert isinstance(sys.stdout, io.TextIOWrapper)
    at_once = sys.stdout.write_through  # as `python -u` has it
    sys.stdout = io.TextIOWrapper(
        os.fdopen(os.dup(1), "wb", 0 if at_once else -1),
        sys.stdout.encoding,
        sys.stdout.errors,
        line_buffering=sys.stdout.line_buffering,
        write_through=at_once,
    )
    os.dup2(2, 1)


def end_process(code: int) -> NoReturn:
    """Ends the process with what `exit_code` returned, an interrupted one by the signal: a shell's loop then ends too.

    Not by Python's own way out: after an interrupt (one that stopped an answer counts) XLA crashes in it.
    """
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def interrupt_by_exception() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, for a job that goes on or has something to put away.

    Until then it ends the process on the spot; see `qwen2_jax/__main__.py`.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def parse(options: Any, argv: Sequence[str], prog: str) -> Any:
    """The command line as an instance of the dataclass `options`, or of one in a union; `--help` prints and exits.

    An option is described in one line, however long a terminal makes it: tyro keeps the line breaks of its docstring.

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
    # A group of options that refuses one of them names it itself.
    complaints[0] = re.sub(r"^Error parsing (?!-)[\w ]*: ", "", complaints[0])
    for section in sections[1:]:
        if section.startswith("Unrecognized"):
            complaints.append(section)
        elif section.startswith("Perhaps you meant"):
            meant = dict.fromkeys(re.findall(r"^--[\w-]+", section, re.MULTILINE))
            # Another job may have the very option that this one refuses.
            others = [option for option in meant if not re.search(rf"{option}(?![\w-])", complaints[-1])]
            if others:
                complaints.append(f"perhaps you meant {' or '.join(others)}")
    return "; ".join(complaints)


def _complaint(error: Exception) -> str | None:
    """What to tell the user about an error that is theirs to mend; None for a bug of ours."""
    text = str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.strerror and error.filename is not None else text
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text):
        return f"out of memory: {text or type(error).__name__}; ask for fewer tokens or run a smaller batch"
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return f"{text}; mend or unset JAX_PLATFORMS"
    if isinstance(error, ValueError) and _raised_by_us(error):
        return text or type(error).__name__
    return None


def _raised_by_us(error: Exception) -> bool:
    """Whether a `raise` of this project made the error.

    Everybody's mistakes are ValueErrors: a wrong shape inside NumPy or JAX too, and that is a bug of ours. What tells
    them apart is the innermost frame: for the user's it is one of ours, and stands at a `raise`. The frame alone does
    not tell, since C functions have none and JAX hides its own.
    """
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    package = (place.tb_frame.f_globals.get("__package__") or "").partition(".")[0]
    return package in _PACKAGES and place.tb_frame.f_code.co_code[place.tb_lasti] == opcode.opmap["RAISE_VARARGS"]


def _one_line(text: str) -> str:
    """Safe for a terminal: names and values in it may come from files of somebody else."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} ... {line[-_TAIL:]}"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads
        sys.stderr.write(text)
        sys.stderr.flush()


def _settle(stream: Any) -> None:
    """Writes out what a stream still holds; if that fails, Python's last flush must not complain once more."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
