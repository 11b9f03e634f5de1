"""How commands end: the exit status, one line or a traceback, interrupts, and streams that are not there."""

import os
import signal
import subprocess
import sys

import pytest

from qwen2_jax.cli import main
from qwen2_jax.command import exit_code, parse
from qwen2_jax.sampling import Sampling


def in_package(source: str, package: str = "qwen2_jax.commands"):
    """A function without arguments whose body stands in one of the packages."""
    namespace = {"__package__": package}
    exec("import numpy, jax\ndef run():\n" + "".join(f"    {line}\n" for line in source.splitlines()), namespace)
    return namespace["run"]


@pytest.mark.parametrize(
    "raised, line",
    [
        ("ValueError('two\\nlines')", "two lines"),
        ("ValueError()", "ValueError"),
        ("UnicodeError('half a pair')", "half a pair"),
        ("FileNotFoundError(2, 'No such file or directory', 'a b')", "a b: No such file or directory"),
        ("OSError(28, 'No space left on device')", "[Errno 28] No space left on device"),
        ("ValueError('\\x1b[2Jred \\u202e')", r"\x1b[2Jred \u202e"),
        ("MemoryError()", "out of memory: MemoryError; ask for fewer tokens or run a smaller batch"),
        (
            "RuntimeError('RESOURCE_EXHAUSTED: 9 bytes')",
            "out of memory: RESOURCE_EXHAUSTED: 9 bytes; ask for fewer tokens or run a smaller batch",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(raised, line, capsys):
    assert exit_code(in_package(f"raise {raised}")) == 2
    assert capsys.readouterr().err == f"qwen2-jax: error: {line}\n"


def test_long_messages_keep_their_start_and_their_end(capsys):
    assert exit_code(in_package("raise ValueError('start' + 'x' * 100_000 + 'what to do')")) == 2
    err = capsys.readouterr().err
    assert len(err) < 1300 and "start" in err and err.endswith("what to do\n")


@pytest.mark.parametrize(
    "source",
    [
        "{}['nothing']",
        "numpy.zeros(3).reshape(2)",  # C code: its ValueError has no frame of its own
        "numpy.concatenate([numpy.zeros(1), numpy.zeros((1, 1))])",
        "jax.jit(lambda: jax.numpy.broadcast_to(jax.numpy.zeros(3), (2,)))()",
        "int('x')",
        "RuntimeError.raised",
        "raise RuntimeError('INTERNAL')",
        "assert False",
    ],
)
def test_our_bugs_show_where_they_are(source, capsys):
    assert exit_code(in_package(source)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_value_error_of_somebody_else_is_our_bug(capsys):
    assert exit_code(in_package("raise ValueError('shapes')", package="jax._src.lax")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_errors_that_pass_through_jax_are_still_ours(capsys):
    source = "def traced():\n    raise ValueError('refused')\njax.jit(traced)()"
    assert exit_code(in_package(source)) == 2
    assert exit_code(lambda: Sampling(temperature=-1)) == 2
    assert exit_code(lambda: parse(int, ["x"], "test")) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_interrupts_and_results():
    assert exit_code(in_package("raise KeyboardInterrupt")) == 130
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 2) == 2


def test_nobody_reads_the_complaint(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert exit_code(in_package("raise ValueError('x')")) == 2
        assert exit_code(in_package("raise RuntimeError('x')")) == 1


def test_jobs_without_an_installation_have_no_version(monkeypatch, capsys):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["--version"]) == 2
    assert "pip install" in capsys.readouterr().err


def shell(line: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a line of sh, in which $Q is the command."""
    environment = {**os.environ, **variables, "Q": f"{sys.executable} -m qwen2_jax"}
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    "line, code",
    [
        ("$Q --help >&-", 0),
        ("$Q generate --model . --prompt '' >&- 2>&-", 2),
        ("$Q generate --model . <&-", 2),
        ("$Q --help | true", 0),
    ],
)
def test_closed_streams(line, code):
    done = shell(line)
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_full_disk():
    done = shell("$Q --help > /dev/full")
    assert (done.returncode, done.stderr) == (2, "qwen2-jax: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_interrupts_end_the_process_at_once_unless_they_are_ignored(ignored):
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, getattr(signal, sys.argv[1])); import qwen2_jax.__main__;"
        "print(signal.getsignal(signal.SIGINT).name)"
    )
    command = [sys.executable, "-c", script, "SIG_IGN" if ignored else "default_int_handler"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("SIG_IGN" if ignored else "SIG_DFL")


def test_an_interrupted_job_dies_by_the_signal():
    script = (
        "import sys; from qwen2_jax import command; command.prepare_process(); print('said', end='');"
        "command.end_process(command.exit_code(lambda: (_ for _ in ()).throw(KeyboardInterrupt)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "said", "\n")


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_standard_output_is_pythons_alone(flags):
    script = (
        "import os, sys; from qwen2_jax import command; command.prepare_process(); print('before', end=' ');"
        "command.keep_stdout(); os.write(1, b'library'); print('after \\udcff', end='');"
        "os._exit(7) if sys.stdout.write_through else None;"
        "command.end_process(command.exit_code(lambda: 0))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, *flags, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (7 if flags else 0, "before after \\udcff", "library")
