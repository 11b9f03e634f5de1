"""A process that tokenizes: `python -m train.data.worker`, a task per line in, an answer per line out.

A program of its own, and not a child made by multiprocessing: that would import the main program again, JAX with it,
and would live on where its parent was killed.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from convert.files import shown
from train.data.encode import Encoder, Encoding, TooManyBad
from train.data.files import DataFile
from train.data.readers import Bad, Part

_ROOT = Path(__file__).parents[2]


class Worker:
    """The parent's side of one process."""

    def __init__(self, folder: Path, how: Encoding):
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )
        self._setup: list[Any] = [str(folder), *how]

    def write(self, number: int, part: Part, max_bad: int) -> dict[str, Any]:
        """As `Encoder.write`; also raises ValueError if the process dies, RuntimeError if it has a bug."""
        assert self._process.stdin is not None and self._process.stdout is not None
        task = json.dumps([*([self._setup] if self._setup else []), [number, part, max_bad]])
        self._setup = []
        try:
            self._process.stdin.write(task.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            code = self._process.wait()
            raise ValueError(
                f"the process that read {shown(part.files[0].path)} ended with status {code}: memory is short, or the "
                "file is damaged; what is finished is kept"
            )
        kind, *rest = json.loads(answer)
        if kind == "bad":
            raise TooManyBad([Bad(*record) for record in rest[0]], rest[1])
        if kind == "system":
            raise OSError(*rest)
        if kind == "user":
            raise ValueError(rest[0])
        if kind == "bug":
            raise RuntimeError(f"a process that tokenized {part.files[0].path} failed:\n{rest[0]}")
        assert kind == "done"
        return rest[0]

    def stop(self) -> None:
        """Ends the process on the spot; what it has not finished is written anew another time."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def main() -> None:
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    encoder = None
    while True:
        *setup, (number, part, max_bad) = json.loads(lines.get())
        try:
            if setup:
                encoder = Encoder(Path(setup[0][0]), Encoding(*setup[0][1:]))
            assert encoder is not None
            files = tuple(DataFile(*file) for file in part[0])
            answer = ["done", encoder.write(number, Part(files, *part[1:]), max_bad)]
        except TooManyBad as error:
            answer = ["bad", *error.args]
        except OSError as error:
            answer = ["system", *([error.errno, error.strerror, error.filename] if error.errno else [str(error)])]
        except ValueError as error:
            answer = ["user", str(error)]
        except Exception:
            answer = ["bug", traceback.format_exc()]
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _listen(lines: "SimpleQueue[bytes]") -> None:
    """Ends the process, whatever it is doing, as soon as nobody can give it anything to do."""
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
