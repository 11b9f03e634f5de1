"""Runs a program that a model wrote, with its tests, in a process of its own that is held in check.

What holds it, from the outside in:

- a process group and, where the kernel has it, a PID namespace: when its time is over, everything it started is killed;
- limits on processor time, memory, the size of a file, open files, core dumps and, but for root, processes;
- a network namespace without any network, where the kernel lets an ordinary user have one (Linux);
- an empty working folder that is removed, and an environment with next to nothing in it. In a mount namespace the
  folder is in memory, no larger than it may become, and `/proc` shows the program alone; elsewhere a program whose
  folder has grown larger is ended as soon as that is seen;
- no capabilities, for root neither (Linux);
- Landlock (Linux 5.13): nothing outside that folder is created, written or removed (6.2: nor truncated), nothing is
  executed, and no other process's memory or environment is read; no TCP (6.7); no signals and abstract sockets (6.12);
- a hook in its interpreter that refuses sockets but for pairs, other programs, signals, other interpreters, foreign
  code (ctypes) and every change to a file outside that folder.

What does not: it runs as the same user and may read the files which that user may read. The hook stops what Python code
does by mistake or as a matter of course, not a program that sets out to break the interpreter, and not what an
extension module does without a word. Behind it, even with Landlock and namespaces, are the mode, owner and times of the
user's files, and servers that listen at a path. Without Landlock (macOS, older kernels, containers that forbid it) only
the hook stands before the user's files and other programs, without namespaces (macOS, containers and distributions that
forbid them) before the network, and without either before the environment of the user's other processes. Root's
threads are bounded by memory alone. A program that looks for the mark of success in its own interpreter can find it.
Run programs of a model that you have reason to distrust in a virtual machine.

With Landlock but no namespaces, `multiprocessing` has nowhere to keep its semaphores: programs that need them fail.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import secrets
import selectors
import signal
import struct
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
    disk: int = 64 << 20
    """Bytes of all files together; an empty one takes a page."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ValueError(f"the limit {field.name} must be positive, got {value}")


DEFAULT_LIMITS = Limits()


def run_program(
    program: str, limits: Limits = DEFAULT_LIMITS, *, namespaces: bool = True, landlock: bool = True
) -> Outcome:
    """Runs a Python program to its end, which is where its tests have passed.

    A program that ends itself before (`sys.exit(0)`, `os._exit(0)`) has failed.

    Args:
      program: source code, tests included.
      namespaces: use the kernel's, where it has them.
      landlock: likewise.
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
                "landlock": landlock,
            }
            return _run(json.dumps(asked).encode(), marker, limits.seconds, folder)
    except (OSError, RecursionError) as error:  # folders in folders without end cannot be removed
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
    # NumPy starts a thread for each core, and the C library keeps addresses for each thread, which count as memory.
    fixed |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {"MALLOC_ARENA_MAX": "1"}
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
            ended = process.poll() is not None  # asked first: what it wrote before its end is then there to read
            ready = selector.select(0.05)
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                heard[key.fd] += data[: max(0, 16 * _KEPT - len(heard[key.fd]))]
            if time.monotonic() > deadline:
                return bytes(heard[reports]), bytes(heard[output]), True
            if ended and not ready:  # something that outlived it may hold the other end
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
    status = _wait(program, asked)
    if isinstance(status, str):
        line = status
    elif -status == signal.SIGXCPU:
        line = "timed out"
    else:
        line = f"ended with status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
    _kill_children()
    os.write(report, f"\n{line}\n".encode())
    os._exit(0 if status == 0 else 1)


def _wait(program: int, asked: Mapping[str, Any]) -> int | str:
    """How it ended, negative by a signal; in words, why it was ended."""
    deadline = time.monotonic() + asked["seconds"]
    while True:
        ended, status = os.waitpid(program, os.WNOHANG)
        left = deadline - time.monotonic()
        if _takes_more(asked["folder"], asked["disk"]):
            why = f"error its files take more than {asked['disk']} bytes"
        elif ended:
            return os.waitstatus_to_exitcode(status)
        elif left <= 0:
            why = "timed out"
        elif hasattr(signal, "sigtimedwait"):
            signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.05))
            continue
        else:  # macOS
            time.sleep(min(left, 0.01))
            continue
        if not ended:
            os.kill(program, signal.SIGKILL)
        return why


def _takes_more(folder: str, limit: int) -> bool:
    """Whether what is in a folder takes more than `limit` bytes. An empty file takes a page: it is not for nothing."""
    taken, folders = 0, [folder]
    while folders and taken <= limit:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    taken += max(512 * entry.stat(follow_symlinks=False).st_blocks, 4096)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):  # it is gone
            continue
        except OSError:  # shut, or too deep: no place to hide files in
            return True
    return taken > limit


def _program(asked: Mapping[str, Any], report: int) -> None:
    """The program, its tests, and the mark that it came to its end. Does not return."""
    import resource
    import traceback

    _die_with_parent()
    if sys.platform.startswith("linux"):
        if asked["namespaces"]:
            _mount(asked["folder"], asked["disk"])
        if asked["landlock"]:
            _lock(asked["folder"])
        _drop_capabilities()
    seconds = int(-(-asked["seconds"] // 1))
    processes = _most_processes()
    for name, soft, hard in (
        ("RLIMIT_CPU", seconds, seconds + 1),
        ("RLIMIT_AS", asked["memory"], asked["memory"]),
        ("RLIMIT_FSIZE", asked["file_size"], asked["file_size"]),
        ("RLIMIT_NOFILE", 64, 64),
        ("RLIMIT_NPROC", processes, processes),
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
        for module, name in itertools.product((os, sys.modules["posix"]), ("mkfifo", "mknod")):
            delattr(module, name)  # they tell no hook
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
        "os.startfile os.setxattr os.removexattr os.chflags ctypes.dlsym cpython.PyInterpreterState_New".split()
    )
    # Where the paths stand among what an event gives, and the open folders that these are relative to.
    changed: dict[str, tuple[tuple[int, int | None], ...]] = {
        "os.remove": ((0, 1),),
        "os.rename": ((0, 2), (1, 3)),
        "os.rmdir": ((0, 1),),
        "os.mkdir": ((0, 2),),
        "os.link": ((0, 2), (1, 3)),
        "os.symlink": ((0, None), (1, 2)),
        "os.truncate": ((0, None),),
        "os.utime": ((0, 3),),
        "os.chmod": ((0, 2),),
        "os.chown": ((0, 3),),
        "os.lchmod": ((0, None),),
        "shutil.rmtree": ((0, 1),),
        "shutil.move": ((0, None), (1, None)),
    }
    # Modules that change files, or have interpreters of their own, and tell no hook.
    silent = set("readline _dbm _gdbm _tkinter _posixshmem _interpreters _xxsubinterpreters".split())
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    decoded, real, join, null, is_folder = os.fsdecode, os.path.realpath, os.path.join, os.devnull, os.path.isdir
    inside, linux, unix = join(folder, ""), sys.platform.startswith("linux"), 1  # AF_UNIX

    def check(path: Any, beneath: int | None = None) -> None:
        if isinstance(path, int) or path is None:  # an open file
            return
        name = decoded(path)
        if linux and beneath is not None and beneath >= 0:  # elsewhere: no folder outside can be open
            name = join(f"/proc/self/fd/{beneath}", name)
        if name != null and not join(real(name), "").startswith(inside):
            raise PermissionError(f"programs under test may not change {name!r}")

    def hook(event: str, given: tuple) -> None:
        if event == "open":
            path, mode, flags = given
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & writing)
            if writes or (mode is None and is_folder(path)):  # `os.open` does not say what a path is relative to
                check(path)
        elif event in changed:
            for path, beneath in changed[event]:
                check(given[path], None if beneath is None else given[beneath])
        elif event == "sqlite3.connect":
            name = decoded(given[0])
            if name.startswith("file:"):  # it may be a URI
                name = name.removeprefix("file:").partition("?")[0].partition("#")[0]
                if "%" in name:
                    raise PermissionError(f"programs under test may not change {name!r}: write it without %")
            check(name)
        elif event == "import" and given[0] in silent:
            raise ImportError(f"programs under test have no {given[0]}")
        elif event == "socket.__new__" and given[1] == unix:  # the two ends of a pair, such as asyncio's
            return
        elif event.startswith(refused) or (event == "ctypes.dlopen" and given[0] is not None):
            raise PermissionError(f"programs under test may not do this: {event}")

    return hook


_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18


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


def _mount(folder: str, size: int) -> None:
    """Puts the folder into memory, and its own processes alone into `/proc`, as far as the kernel allows."""
    libc, flags = _libc(), _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        return
    libc.mount(b"proc", b"/proc", b"proc", flags, None)
    options = f"size={size},nr_inodes={size // 4096 + 1},mode=700"
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()) == 0:
        libc.mount(os.fsencode(folder), b"/dev/shm", None, _MS_BIND, None)  # where the C library keeps semaphores
        os.chdir(folder)


def _lock(folder: str) -> None:
    """Landlock, where the kernel has it: files change in the folder alone, nothing is executed, no TCP.

    The numbers are those of `linux/landlock.h`; a kernel's version says which of them it knows.
    """
    import ctypes

    libc = _libc()

    def call(number: int, *arguments: Any) -> int:
        return libc.syscall(ctypes.c_long(number), *arguments)

    create, add, restrict = 444, 445, 446  # on every architecture
    version = call(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    execute, write, reading, devices, truncate, control = 1, 1 << 1, 3 << 2, 1 << 6 | 1 << 11, 1 << 14, 1 << 15
    handled = known & ~reading
    wanted = struct.pack("=3Q", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)  # files, TCP, scopes
    rules = call(create, wanted, ctypes.c_size_t(len(wanted)), 0)
    held = rules >= 0
    for path, allowed in (
        (folder, handled & ~(execute | devices | control)),
        (os.devnull, handled & (write | truncate)),
    ):
        beneath = os.open(path, os.O_PATH)
        held = held and call(add, rules, 1, struct.pack("=Qi", allowed, beneath), 0) == 0
        os.close(beneath)
    if not held or call(restrict, rules, 0):
        raise OSError(ctypes.get_errno(), "Landlock does not do what this kernel says it can")
    os.close(rules)


def _drop_capabilities() -> None:
    """Those of root, and those that come with a namespace."""
    import ctypes

    _libc().capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def _most_processes() -> int:
    """As many as the machine runs, of which the user's are a part, and some threads: the limit counts both."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2]) + 256
    except (OSError, IndexError, ValueError):  # macOS, where threads do not count
        return 0


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
