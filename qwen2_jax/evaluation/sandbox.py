"""Runs a program that a model wrote, with its tests, in a process of its own that is held in check.

What holds it, from the outside in:

- a process group and, where the kernel has it, a PID namespace: when its time is over, everything it started is killed;
- limits on processor time, memory, the size of a file, open files and core dumps;
- a network namespace without any network, where the kernel lets an ordinary user have one (Linux);
- an empty working folder that is removed, and an environment with next to nothing in it;
- a hook in its interpreter that refuses sockets, other programs, signals, foreign code (ctypes) and every change to a
  file outside that folder.

What does not: it runs as the same user and may read what that user may read. The hook stops what Python code does by
mistake or as a matter of course, not a program that sets out to break the interpreter; and without namespaces (macOS,
or containers and distributions that forbid them) only the hook stands between it and the network. A program that looks
for the mark of success in its own interpreter can find it. Run programs of a model that you have reason to distrust in
a virtual machine.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "timed out", "could not run"]

_GRACE = 5.0  # seconds for the interpreter to start and to clean up, on top of the program's own
_KEPT = 4096  # characters of output
_LINE = 300  # characters of an error


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: Status
    """`could not run`: it was never started, for reasons that are not its own."""
    detail: str = ""
    """The last line of the error; empty if it passed."""
    output: str = ""
    """The beginning of what it printed."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Raises:
      ValueError: for a limit that is not positive.
    """

    seconds: float = 10.0
    """Of wall clock, and of processor time rounded up."""
    memory: int = 1 << 30
    """Bytes of address space."""
    file_size: int = 16 << 20
    """Bytes of one file."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ValueError(f"the limit {field.name} must be positive, got {value}")


DEFAULT_LIMITS = Limits()


def run_program(program: str, limits: Limits = DEFAULT_LIMITS, *, namespaces: bool = True) -> Outcome:
    """Runs a Python program to its end, which is where its tests have passed.

    A program that ends itself before (`sys.exit(0)`, `os._exit(0)`) has failed.

    Args:
      program: source code, tests included.
      namespaces: use the kernel's, where it has them.
    """
    if not sys.executable:
        return Outcome("could not run", "this process does not know its Python interpreter")
    marker = secrets.token_hex(16)
    try:
        with tempfile.TemporaryDirectory(prefix="qwen2-jax-program-", ignore_cleanup_errors=True) as folder:
            asked = {
                **dataclasses.asdict(limits),
                "program": program,
                "marker": marker,
                "folder": os.path.realpath(folder),
                "namespaces": namespaces,
            }
            return _run(json.dumps(asked).encode(), marker, limits.seconds, folder)
    except OSError as error:
        return Outcome("could not run", _last_line(str(error)))


def _run(asked: bytes, marker: str, seconds: float, folder: str) -> Outcome:
    reports, report = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(__file__).resolve()), str(report)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_environment(folder),
            pass_fds=(report,),
            start_new_session=True,
        )
    except BaseException:
        os.close(reports)
        raise
    finally:
        os.close(report)
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(asked)
        said, printed, late = _listen(process, reports, process.stdout.fileno(), seconds + _GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone, and all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        os.close(reports)
    return _judged(said.decode(errors="replace"), printed.decode(errors="replace"), late, marker, process.returncode)


def _environment(folder: str) -> dict[str, str]:
    fixed = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    # Threads count as processes, of which there may be none; and NumPy starts one for each core.
    fixed |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    linker = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return fixed | linker  # some interpreters do not start without


def _listen(process: subprocess.Popen, reports: int, output: int, seconds: float) -> tuple[bytes, bytes, bool]:
    """What the process reports and prints until it ends or its time is over; most of a flood is thrown away."""
    heard = {reports: bytearray(), output: bytearray()}
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for descriptor in heard:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(0.05)
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                heard[key.fd] += data[: max(0, 16 * _KEPT - len(heard[key.fd]))]
            if time.monotonic() > deadline:
                return bytes(heard[reports]), bytes(heard[output]), True
            if not ready and process.poll() is not None:  # something that outlived it may hold the other end
                break
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
        return bytes(heard[reports]), bytes(heard[output]), False
    return bytes(heard[reports]), bytes(heard[output]), True


def _judged(said: str, printed: str, late: bool, marker: str, code: int) -> Outcome:
    lines = said.splitlines()
    output = printed[:_KEPT]
    if "started" not in lines:
        reason = printed.strip() or f"the interpreter ended with status {code}"
        return Outcome("could not run", "no answer from the interpreter" if late else _last_line(reason), output)
    if late or "timed out" in lines:
        return Outcome("timed out", "took longer than it may", output)
    if marker in lines and code == 0:
        return Outcome("passed", "", output)
    errors = [line.removeprefix("error ") for line in lines if line.startswith("error ")]
    if errors:
        return Outcome("failed", _last_line(errors[-1]), output)
    ended = [line.removeprefix("ended ") for line in lines if line.startswith("ended ")] or [f"by itself, {code}"]
    return Outcome("failed", f"ended before its tests had passed: {ended[-1]}", output)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in (lines[-1].strip() if lines else ""))
    return line if len(line) <= _LINE else f"{line[: _LINE - 3]}..."


# From here on: what runs in the new process. `python -I` finds nothing of this project, so all of it stands here.


def _main() -> None:
    asked = json.loads(sys.stdin.buffer.read())
    report = int(sys.argv[1])
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if asked["namespaces"]:
        _leave_network()
    _adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    program = os.fork()
    if program == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _program(asked, report)
    status = _wait(program, asked["seconds"])
    if status is None:
        os.kill(program, signal.SIGKILL)
    _kill_children()
    if status is None or -status == signal.SIGXCPU:
        line = "timed out"
    else:
        line = f"ended with status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
    os.write(report, f"\n{line}\n".encode())
    os._exit(0 if status == 0 else 1)


def _wait(program: int, seconds: float) -> int | None:
    """How it ended, negative by a signal; None if its time was over before."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(program, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        if hasattr(signal, "sigtimedwait"):
            signal.sigtimedwait({signal.SIGCHLD}, left)
        else:  # macOS
            time.sleep(min(left, 0.01))


def _program(asked: Mapping[str, Any], report: int) -> None:
    """The program, its tests, and the mark that it came to its end. Does not return."""
    import resource
    import traceback

    _die_with_parent()
    seconds = int(-(-asked["seconds"] // 1))
    # RLIMIT_NPROC counts all of the user's processes: with 0 none can be added. Root is exempt, and has the hook.
    for name, soft, hard in (
        ("RLIMIT_CPU", seconds, seconds + 1),
        ("RLIMIT_AS", asked["memory"], asked["memory"]),
        ("RLIMIT_FSIZE", asked["file_size"], asked["file_size"]),
        ("RLIMIT_NOFILE", 64, 64),
        ("RLIMIT_NPROC", 0, 0),
        ("RLIMIT_CORE", 0, 0),
    ):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS has no address space to limit
            resource.setrlimit(getattr(resource, name), (soft, hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too long is an OSError then
    write, leave, marker = os.write, os._exit, asked["marker"]  # the program may replace what it likes
    write(report, b"started\n")
    sys.argv = [""]
    try:
        code = compile(asked["program"], "<program>", "exec")
        sys.addaudithook(_guard(asked["folder"]))
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    except BaseException as error:  # SystemExit too: a program that leaves has not come to the end of its tests
        line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1:] or [type(error).__name__]
        write(report, f"\nerror {line[0][:_LINE]}\n".encode(errors="replace"))
        leave(1)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    write(report, f"\n{marker}\n".encode())
    leave(0)


def _guard(folder: str) -> Any:
    """A hook of the interpreter, which Python code cannot take away: raises for what the program must not do."""
    refused = tuple(
        "socket. subprocess. pty. os.exec os.spawn os.posix_spawn os.fork os.system os.kill signal.pthread_kill "
        "os.startfile os.setxattr os.chflags ctypes.dlsym".split()
    )
    changed = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime"}
    changed |= {"os.chmod", "os.chown", "os.lchmod", "shutil.rmtree", "shutil.move", "sqlite3.connect"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    path_of, real, join, null = os.fspath, os.path.realpath, os.path.join, os.devnull
    inside = join(folder, "")

    def check(path: Any) -> None:
        if isinstance(path, int) or path is None:  # an open file
            return
        name = path_of(path)
        name = name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
        if name != null and not join(real(name), "").startswith(inside):
            raise PermissionError(f"programs under test may not change {name!r}")

    def hook(event: str, given: tuple) -> None:
        if event == "open":
            path, mode, flags = given
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & writing):
                check(path)
        elif event in changed:
            for path in given[:2] if event in ("os.rename", "os.link", "os.symlink", "shutil.move") else given[:1]:
                check(path)
        elif event.startswith(refused) or (event == "ctypes.dlopen" and given[0] is not None):
            raise PermissionError(f"programs under test may not do this: {event}")

    return hook


_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _leave_network() -> None:
    """New namespaces for this process's network and its children's ids, as many as the kernel allows."""
    if not sys.platform.startswith("linux"):
        return
    user, group = os.getuid(), os.getgid()
    for flags in (
        _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWPID,
        _CLONE_NEWUSER | _CLONE_NEWNET,
        _CLONE_NEWNET | _CLONE_NEWPID,  # for root in a container that forbids user namespaces
    ):
        if _libc().unshare(flags) == 0:
            break
    else:
        return
    if flags & _CLONE_NEWUSER:  # who was there stays the same user, as far as the program can see
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _adopt_orphans() -> None:
    """Whatever the program starts becomes a child of this process once its own parent is gone, and can be killed."""
    if sys.platform.startswith("linux"):
        _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent() -> None:
    if sys.platform.startswith("linux"):
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _kill_children() -> None:
    """Kills children until there are none; those of a child that is killed come next."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    deadline = time.monotonic() + _GRACE / 2
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # not Linux: the process group is all there is to kill
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, os.WNOHANG if children.exists() else 0)
        except ChildProcessError:
            return
        time.sleep(0.001)


if __name__ == "__main__":
    _main()
