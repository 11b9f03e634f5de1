"""Programs that misbehave, one for each thing that the sandbox holds back."""

import ctypes
import json
import os
import pwd
import shutil
import signal
import subprocess
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


# The hook must do without what the kernel may not have.
BARE = {"namespaces": False, "landlock": False}
WAYS = pytest.mark.parametrize("held", [{}, {"namespaces": False}, {"landlock": False}, BARE], ids=str)


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


@pytest.mark.parametrize("held", [{}, BARE], ids=str)
def test_files_elsewhere_are_not_changed(tmp_path, monkeypatch, held):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the working folder is beside `there`
    there = tmp_path / "there"
    there.write_text("kept")
    below = "import os; os.mkdir('a'); above = os.open('.', os.O_RDONLY); os.chdir('a'); "
    for change in (
        f"open({str(there)!r}, 'w')",
        f"open({str(there)!r}, 'r+')",
        f"open({str(tmp_path / 'new')!r}, 'x')",
        f"import os; os.open({str(there)!r}, os.O_RDWR)",
        f"import os; os.open('there', os.O_RDWR, dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))",
        f"import os; os.remove({str(there)!r})",
        f"import os; os.remove('there', dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))",
        f"{below} os.remove('../there', dir_fd=above)",
        f"{below} os.rename('../there', 'here', src_dir_fd=above)",
        f"{below} os.rename('../a', '../new', dst_dir_fd=above)",
        f"{below} os.mkdir('../new', dir_fd=above)",
        f"{below} os.chmod('../there', 0, dir_fd=above)",
        f"{below} os.utime('../there', dir_fd=above)",
        f"import os; os.rename({str(there)!r}, 'here')",
        f"import os; os.truncate({str(there)!r}, 0)",
        f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/new', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'new').mkdir()",
        f"import sqlite3; sqlite3.connect({str(tmp_path / 'new')!r})",
        f"import sqlite3; sqlite3.connect('file:{tmp_path / 'new'}?mode=rwc', uri=True)",
        f"import sqlite3; sqlite3.connect('file://{tmp_path / 'new'}#', uri=True)",
        f"import sqlite3; sqlite3.connect('file:%2f{tmp_path / 'new'}', uri=True)",
    ):
        refused(run_program(change, ANY, **held), "programs under test may not change")
    assert there.read_text() == "kept" and list(tmp_path.iterdir()) == [there]


@WAYS
def test_files_in_the_working_folder_are_changed(held):
    program = """
import os, shutil, sqlite3, tempfile
open('a', 'w').write('x')
os.mkdir('c')
os.rename('a', 'c/b')
os.link('c/b', 'd')
os.symlink('d', 'e')
os.truncate('d', 0)
os.chmod('d', 0o600)
above = os.open('.', os.O_RDONLY)
os.remove('b', dir_fd=os.open('c', os.O_RDONLY, dir_fd=above))
shutil.rmtree('c')
with tempfile.TemporaryDirectory() as folder:
    open(os.path.join(folder, 'f'), 'w').close()
open(os.devnull, 'w').write('x')
sqlite3.connect('g').execute('create table t (n)')
sqlite3.connect('file:g?mode=rw', uri=True).execute('select * from t')
sqlite3.connect(':memory:')
assert sorted(os.listdir()) == ['d', 'e', 'g'], os.listdir()
"""
    outcome = run_program(program, ANY, **held)
    assert outcome.passed, outcome


@pytest.mark.parametrize("held", [{}, BARE], ids=str)
@pytest.mark.parametrize(
    ("program", "because"),
    [
        ("import os; os.mkfifo('a')", "has no attribute 'mkfifo'"),
        ("import posix; posix.mknod('a')", "has no attribute 'mknod'"),
        ("import readline", "programs under test have no readline"),
        ("import importlib; importlib.import_module('_posixshmem')", "programs under test have no _posixshmem"),
        (
            "try: import _interpreters as all\nexcept ImportError: import _xxsubinterpreters as all\nall.create()",
            "programs under test have no _xxsubinterpreters",
        ),
    ],
)
def test_what_tells_no_hook_is_not_there(program, because, held):
    refused(run_program(program, ANY, **held), because)


@WAYS
@pytest.mark.parametrize(
    "program",
    [
        "for n in range(100): open(str(n), 'wb').write(bytes(1 << 20))",
        "for n in range(10_000): open(str(n), 'wb')",
    ],
)
def test_the_size_of_all_files_is_limited(program, held):
    outcome = run_program(program, Limits(seconds=30, disk=8 << 20), **held)
    assert outcome.status == "failed", outcome
    assert "No space left on device" in outcome.detail or outcome.detail == "its files take more than 8388608 bytes"
    assert run_program("open('a', 'wb').write(bytes(6 << 20))", Limits(seconds=30, disk=8 << 20), **held).passed


def test_nothing_in_a_folder_is_for_nothing(tmp_path):
    page = 4096
    assert not sandbox._takes_more(str(tmp_path), page - 1)
    (tmp_path / "empty").touch()
    assert sandbox._takes_more(str(tmp_path), page - 1) and not sandbox._takes_more(str(tmp_path), page)
    (tmp_path / "link").symlink_to("/")
    assert sandbox._takes_more(str(tmp_path), 2 * page - 1) and not sandbox._takes_more(str(tmp_path), 1 << 20)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(1 << 20))
    assert sandbox._takes_more(str(tmp_path), 1 << 20) and not sandbox._takes_more(str(tmp_path), (1 << 20) + 16 * page)
    assert not sandbox._takes_more(str(tmp_path / "gone"), page)


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
        "import socket; socket.socket(socket.AF_UNIX).connect('/run/server')",
        "import socket; socket.socketpair()[0].bind('/run/server')",
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
    run_program(program, SOON, namespaces=namespaces, landlock=False)
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
    program = "import numpy as np\nassert (np.ones((300, 300)) @ np.ones((300, 300))).sum() == 27e6"
    assert run_program(program, Limits(seconds=60)).passed
    extensions = "bz2 ctypes curses decimal doctest hashlib lzma mmap multiprocessing pdb select ssl unittest zlib"
    assert run_program(f"import {', '.join(extensions.split())}", Limits(seconds=60)).passed


THREADS = {
    "threading": """
import threading
gate, done = threading.Event(), []
threads = [threading.Thread(target=lambda: done.append(gate.wait())) for _ in range(40)]
for thread in threads: thread.start()
gate.set()
for thread in threads: thread.join()
assert done == [True] * 40
""",
    "futures": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(32) as pool: assert list(pool.map(abs, range(-100, 0))) == list(range(100, 0, -1))
""",
    "asyncio": """
import asyncio
async def main(): return await asyncio.gather(asyncio.sleep(0, 1), asyncio.to_thread(int, '2'))
assert asyncio.run(main()) == [1, 2]
""",
}


@WAYS
@pytest.mark.parametrize("program", THREADS.values(), ids=THREADS)
def test_programs_may_use_threads_and_event_loops(program, held):
    outcome = run_program(program, ANY, **held)
    assert outcome.passed, outcome


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="semaphores are elsewhere")
def test_semaphores_are_the_programs_own():
    if not _has_namespaces():
        pytest.skip("this kernel gives an ordinary user no namespaces")
    before = set(os.listdir("/dev/shm"))
    program = "from multiprocessing.pool import ThreadPool\nassert ThreadPool(4).map(abs, [-1]) == [1]"
    assert run_program(program, ANY).passed
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("held", [{"namespaces": False}, {"landlock": False}], ids=str)
def test_what_other_processes_keep_is_not_read(held):
    if not (_has_landlock() if "namespaces" in held else _has_namespaces()):
        pytest.skip("this kernel has only the hook")
    outcome = run_program(f"open('/proc/{os.getpid()}/environ').read()", ANY, **held)
    assert outcome.status == "failed" and outcome.detail.startswith(("PermissionError", "FileNotFoundError")), outcome


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_other_processes_are_not_seen():
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if not _has_namespaces() or any(path.startswith("/proc/") for path in mounted):
        pytest.skip("this kernel or container gives an ordinary user no /proc")
    outcome = run_program("import os\nprint([name for name in os.listdir('/proc') if name.isdigit()])", ANY)
    assert outcome.output == "['1']\n", outcome


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_programs_have_no_capabilities():
    outcome = run_program("print(open('/proc/self/status').read())", ANY)
    held = dict(line.split(":\t") for line in outcome.output.splitlines() if line.startswith("Cap"))
    assert held["CapPrm"] == held["CapEff"] == "0" * 16


# Ways around the hook, tried without it: what Landlock alone must hold. Each works where there is no Landlock.
_HOLES = """
import json, os, shutil, socket, sqlite3, subprocess, sys, tempfile
from multiprocessing import util
sys.path.insert(0, sys.argv[1])
import sandbox

outside = tempfile.mkdtemp()
inside, there = os.path.join(outside, 'inside'), os.path.join(outside, 'there')
os.mkdir(inside)
shutil.copy('/bin/true', inside)
for name in 'truncated', 'removed', 'renamed', 'linked':
    open(f'{there}-{name}', 'w').write('kept')
above = os.open(outside, os.O_RDONLY)
server = socket.create_server(('127.0.0.1', 0))
os.chdir(inside)
other = subprocess.Popen(['/bin/cat'], stdin=subprocess.PIPE)  # it ends with this process
version = sandbox._libc().syscall(444, None, 0, 1)
sandbox._die_with_parent()
if sys.argv[2] == 'locked':
    sandbox._lock(inside)
    sandbox._drop_capabilities()

def database(path):
    connection = sqlite3.connect('a.db')
    connection.execute('attach ? as other', [path])
    connection.execute('create table other.t (n)')

def spawned():
    _, status = os.waitpid(util.spawnv_passfds(b'/bin/true', ['true'], []), 0)
    if status: raise PermissionError

def interpreter():
    try: import _interpreters as all
    except ImportError: import _xxsubinterpreters as all
    failed = all.run_string(all.create(), f'open({there + "-new"!r}, "w")')
    if failed: raise PermissionError

def history():
    import readline
    readline.write_history_file(there + '-history')

holes = {
    'open': lambda: open(there, 'w'),
    'open beneath': lambda: os.open('beneath', os.O_WRONLY | os.O_CREAT, dir_fd=above),
    'remove beneath': lambda: os.remove('there-removed', dir_fd=above),
    'rename': lambda: os.rename('there-renamed', 'inside/here', src_dir_fd=above, dst_dir_fd=above),
    'link': lambda: os.link('there-linked', 'inside/link', src_dir_fd=above, dst_dir_fd=above),
    'mkdir': lambda: os.mkdir(there + '-folder'),
    'symlink': lambda: os.symlink('a', there + '-symlink'),
    'mkfifo': lambda: os.mkfifo(there + '-fifo'),
    'mknod': lambda: os.mknod(there + '-node'),
    'bind': lambda: socket.socket(socket.AF_UNIX).bind(there + '-server'),
    'database': lambda: sqlite3.connect(f'file:{there}.db?mode=rwc', uri=True).execute('create table t (n)'),
    'attach': lambda: database(there + '-attached.db'),
    'interpreter': interpreter,
    'run': lambda: subprocess.run(['/bin/true']),
    'run inside': lambda: subprocess.run([os.path.join(inside, 'true')]),
    'spawn': spawned,
    'environment': lambda: open(f'/proc/{other.pid}/environ').read(),
}
try:
    import readline
    holes['history'] = history
except ImportError:
    pass
if version >= 3:
    holes['truncate'] = lambda: os.truncate(there + '-truncated', 0)
if version >= 4:
    holes['connect'] = lambda: socket.create_connection(server.getsockname())
    holes['listen'] = lambda: socket.create_server(('127.0.0.1', 0))
if version >= 6:
    holes['signal'] = lambda: os.kill(other.pid, 0)
through = []
for name, hole in holes.items():
    try:
        hole()
        through.append(name)
    except (OSError, sqlite3.OperationalError, RuntimeError):
        pass
    except Exception as error:
        if 'RunFailedError' not in repr(type(error)): raise
open('here', 'w').write('x')
os.mkdir('folder')
os.rename('here', 'folder/here') if version >= 2 else None
open(os.devnull, 'w').write('x')
print(json.dumps([through, list(holes)]))
"""

ORDINARY = pytest.mark.parametrize("user", [None, "nobody"])


@ORDINARY
def test_landlock_holds_what_passes_the_hook(user):
    if not _has_landlock():
        pytest.skip("this kernel has no Landlock")
    for how in "free", "locked":
        through, holes = json.loads(_as(user, _HOLES, how))
        assert through == (holes if how == "free" else [])


@ORDINARY
def test_any_user_runs_programs(user):
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
from sandbox import Limits, run_program
programs, held = map(json.loads, sys.argv[2:])
print(json.dumps([run_program(program, Limits(seconds=30), **held).detail for program in programs]))
"""
    programs = [*THREADS.values(), "open('/tmp/new', 'w')", "open('a', 'w').write('x')"]
    for held in {}, BARE:
        threads, futures, asyncio, elsewhere, here = json.loads(
            _as(user, script, json.dumps(programs), json.dumps(held))
        )
        assert (threads, futures, asyncio, here) == ("", "", "", "") and "may not change" in elsewhere


def _as(user, script, *arguments):
    """What a script prints that another user runs, with a copy of the sandbox that this user may read."""
    python, become = sys.executable, {}
    if user:
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            pytest.skip("only root can become another user")
        become = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        pythons = [p for p in (sys.executable, shutil.which("python3", path=os.defpath)) if p and _runs(p, become)]
        if not pythons:
            pytest.skip("another user has no Python here")
        python = pythons[0]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        shutil.copyfile(sandbox.__file__, Path(folder, "sandbox.py"))
        Path(folder, "sandbox.py").chmod(0o644)
        command = [python, "-I", "-B", "-c", script, folder, *arguments]
        environment = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, **become)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _runs(python, become):
    try:
        enough = "import sys; sys.exit(sys.version_info < (3, 11))"
        return subprocess.run([python, "-I", "-c", enough], cwd="/", **become).returncode == 0
    except OSError:
        return False


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


def test_what_a_process_writes_just_before_its_end_is_read():
    (reports, report), (output, printed) = os.pipe(), os.pipe()

    class Ending:
        """Writes and ends at the worst moment: when it is first looked at."""

        wrote = False

        def poll(self):
            if not self.wrote:
                self.wrote = bool(os.write(report, b"started"))
            return 0

        def wait(self, timeout):
            return 0

    try:
        assert sandbox._listen(Ending(), reports, output, 5.0) == (b"started", b"", False)
    finally:
        for descriptor in (reports, report, output, printed):
            os.close(descriptor)


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


@pytest.mark.parametrize(
    "limits", [{"seconds": 0}, {"memory": -1}, {"file_size": 0}, {"disk": 0}, {"seconds": float("nan")}]
)
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


def _has_landlock():
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
