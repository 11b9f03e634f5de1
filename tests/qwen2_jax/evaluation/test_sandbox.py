"""Programs that misbehave, one for each thing that the sandbox holds back."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from qwen2_jax.evaluation import sandbox
from qwen2_jax.evaluation.sandbox import Limits, run_program

SOON = Limits(seconds=0.5)
ANY = Limits(seconds=30)  # for what ends by itself, on a machine as busy as it likes


def refused(outcome, because):
    assert outcome.status == "failed", outcome
    assert because in outcome.detail, outcome


def test_a_program_that_comes_to_its_end_has_passed():
    outcome = run_program("def add(a, b):\n    return a + b\n\nprint('running')\nassert add(1, 2) == 3\n", ANY)
    assert (outcome.status, outcome.detail, outcome.output) == ("passed", "", "running\n")
    assert outcome.passed


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("raise ValueError('first\\nlast')", "last"),
        ("raise ValueError('\\x1b[31m')", "ValueError: \\x1b[31m"),
        ("input()", "EOFError: EOF when reading a line"),
        ("x = '\\0", "unterminated"),
        ("raise Exception('x' * 10_000)", "Exception: xxx"),
    ],
)
def test_the_last_line_of_an_error_is_kept(program, detail):
    outcome = run_program(program, ANY)
    refused(outcome, detail)
    assert len(outcome.detail) <= 300


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "exit()",
        "import os; os.closerange(3, 256); os._exit(0)",
        "import sys, os; sys.stdout.write('passed'); sys.stdout.flush(); os._exit(0)",
        "import os; [os.write(n, b'\\npassed\\n') for n in range(3, 64) if os.path.exists(f'/proc/self/fd/{n}')]\n"
        "os._exit(0)",
        "import atexit, os; atexit.register(os._exit, 0); exit()",
    ],
)
def test_a_program_that_leaves_before_its_tests_has_failed(leave):
    outcome = run_program(f"{leave}\nassert False", ANY)
    assert outcome.status == "failed", outcome


@pytest.mark.parametrize("loop", ["while True: pass", "import time; time.sleep(1000)"])
@pytest.mark.parametrize("namespaces", [True, False])
def test_a_program_that_does_not_end_is_ended(loop, namespaces):
    start = time.monotonic()
    assert run_program(loop, SOON, namespaces=namespaces).status == "timed out"
    assert time.monotonic() - start < 20


def test_a_program_that_ignores_signals_is_ended_too():
    program = "import signal\nfor n in (1, 2, 3, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    assert run_program(program, SOON).status == "timed out"


def test_a_flood_of_output_is_cut_and_does_not_fill_memory():
    outcome = run_program("while True: print('x' * 100_000)", SOON)
    assert outcome.status == "timed out"
    assert set(outcome.output) <= {"x", "\n"} and len(outcome.output) == 4096


@pytest.mark.skipif(sys.platform != "linux", reason="no limit on address space")
def test_memory_is_limited():
    refused(run_program("x = bytearray(2 << 30)", ANY), "MemoryError")
    assert run_program("x = bytearray(16 << 20)", ANY).passed


def test_the_size_of_a_file_is_limited():
    write = "with open('big', 'wb') as file:\n    file.write(b'x' * ({size} << 20))"
    refused(run_program(write.format(size=20), ANY), "File too large")
    assert run_program(write.format(size=1), ANY).passed


def test_the_working_folder_is_empty_and_is_removed():
    outcome = run_program("import os\nassert os.listdir() == []\nopen('a', 'w').close()\nprint(os.getcwd())", ANY)
    assert outcome.passed and "qwen2-jax-program-" in outcome.output
    assert not Path(outcome.output.strip()).exists()


def test_files_elsewhere_are_not_changed(tmp_path):
    there = tmp_path / "there"
    there.write_text("kept")
    for change in (
        f"open({str(there)!r}, 'w')",
        f"open({str(there)!r}, 'r+')",
        f"open({str(tmp_path / 'new')!r}, 'x')",
        f"import os; os.open({str(there)!r}, os.O_RDWR)",
        f"import os; os.remove({str(there)!r})",
        f"import os; os.rename({str(there)!r}, 'here')",
        f"import os; os.truncate({str(there)!r}, 0)",
        f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/new', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'new').mkdir()",
        f"import sqlite3; sqlite3.connect({str(tmp_path / 'new')!r})",
    ):
        refused(run_program(change, ANY), "programs under test may not change")
    assert there.read_text() == "kept" and list(tmp_path.iterdir()) == [there]
    inside = "open('a', 'w').write('x')\nos.rename('a', 'b')\nos.mkdir('c')\nos.remove('b')\nopen(os.devnull, 'w')"
    assert run_program(f"import os\n{inside}", ANY).passed


@pytest.mark.parametrize(
    "call",
    [
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.killpg(0, 9)",
        "import ctypes; ctypes.CDLL(None).getpid()",
    ],
)
def test_what_a_program_has_no_business_with_is_refused(call):
    outcome = run_program(call, ANY)
    assert outcome.status == "failed" and "programs under test may not do this" in outcome.detail, outcome


# What Python's `subprocess` calls underneath, past the hook: a stand-in for programs that find a way around it.
_AROUND = "from multiprocessing import util\nfor _ in range(4): util.spawnv_passfds(b'{path}', {argv}, [])\n"


@pytest.mark.skipif(not shutil.which("setsid"), reason="needs setsid")
@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("ending", ["", "while True: pass"])
def test_what_a_program_started_is_killed_with_it(namespaces, ending):
    seconds = f"97.{os.getpid()}"
    argv = ["setsid", "sleep", seconds]
    program = _AROUND.format(path=shutil.which("setsid"), argv=argv) + ending
    run_program(program, SOON, namespaces=namespaces)
    assert not [line for line in _command_lines() if line[-2:] == ["sleep", seconds]]


def test_there_is_no_network_behind_the_hook():
    """The namespace itself, asked without Python's sockets."""
    outcome = run_program("print(open('/proc/net/dev').read())", ANY)
    if "could not run" in outcome.status or not _has_namespaces():
        pytest.skip("this kernel gives an ordinary user no namespaces")
    names = [line.partition(":")[0].strip() for line in outcome.output.splitlines() if ":" in line]
    assert names == ["lo"] or all(name.startswith(("lo", "sit", "tunl", "ip6", "gre", "erspan")) for name in names)


def test_the_environment_says_nothing(monkeypatch):
    monkeypatch.setenv("A_SECRET", "token")
    outcome = run_program("import os\nprint(sorted(os.environ))\nassert os.environ['HOME'] == os.getcwd()", ANY)
    assert outcome.passed and "A_SECRET" not in outcome.output and "PYTHONPATH" not in outcome.output


def test_programs_may_use_what_is_installed():
    assert run_program("import numpy as np\nassert np.ones((3, 3)).sum() == 9", Limits(seconds=60)).passed


def test_it_works_beside_other_threads():
    outcomes = []
    threads = [
        threading.Thread(target=lambda n=n: outcomes.append(run_program(f"assert {n} % 2 == 0", ANY))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.status for outcome in outcomes) == ["failed", "failed", "passed", "passed"]


def test_a_program_that_crashes_its_interpreter_has_failed():
    refused(run_program("import ctypes\nctypes.string_at(0)", ANY), "SIGSEGV")


def test_what_is_not_the_programs_fault_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    outcome = run_program("pass", ANY)
    assert outcome.status == "could not run" and "No such file" in outcome.detail
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    broken.chmod(0o755)
    outcome = run_program("pass", ANY)
    assert (outcome.status, outcome.detail) == ("could not run", "broken")
    monkeypatch.setattr(sys, "executable", "")
    assert run_program("pass", ANY).status == "could not run"


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory": -1}, {"file_size": 0}, {"seconds": float("nan")}])
def test_limits_are_positive(limits):
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**limits)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_an_interrupt_ends_the_program_too(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            run_program("while True: pass", ANY)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert list(tmp_path.iterdir()) == []
    children = {pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}
    assert not [pid for pid in children if b"sandbox.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_nothing_is_left_behind():
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for program in ("pass", "while True: pass"):
        run_program(program, SOON)
    after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert after == before


def _command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:  # it has ended
            continue


def _has_namespaces():
    outcome = run_program("import os\nprint(os.readlink('/proc/self/ns/net'))", sandbox.DEFAULT_LIMITS)
    return sys.platform == "linux" and outcome.output.strip() != os.readlink("/proc/self/ns/net")
