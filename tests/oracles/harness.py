"""Small tasks of every kind for lm-evaluation-harness, with data of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.xla import QUICK_ENVIRONMENT

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil green tea in silver pots".split()


def write_tasks(folder: Path) -> Path:
    """Writes NAME.yaml for each kind, and its data, into a folder, and gives the folder."""
    generator = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(generator.choice(WORDS, words))

    questions = [
        {"question": text(9), "choices": [text(words) for words in (1, 3, 4)], "answer": i % 3} for i in range(10)
    ]
    texts = [{"text": text(words)} for words in (2, 5, 9, 14, 60)]  # the last is longer than 256 bytes
    sums = [{"a": int(a), "b": int(b)} for a, b in generator.integers(1, 60, (6, 2))]
    for name, rows in (("questions", questions), ("texts", texts), ("sums", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in (Path(__file__).parent / "harness_tasks").iterdir():
        if file.suffix == ".yaml":
            (folder / file.name).write_text(file.read_text().replace("DATA", str(folder)))
        elif file.suffix == ".py":
            shutil.copy(file, folder)
    return folder


def named(tasks: Path, *names: str) -> str:
    """Tasks of `write_tasks`, as --tasks wants them."""
    return ",".join(str(tasks / f"{name}.yaml") for name in names)


def run_processes(arguments: list[object], count: int, devices: int, folder: Path) -> list[str]:
    """Runs `qwen2-jax evaluate` in so many processes of so many devices together, and gives what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, **QUICK_ENVIRONMENT, "PYTHONPATH": root, "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "qwen2_jax", "evaluate", *map(str, arguments)]
    joined = ["--coordinator", address, "--processes", str(count), "--process"]
    runs = [
        subprocess.Popen(
            [*command, *([*joined, str(process)] if count > 1 else [])],
            **{"env": environment, "cwd": folder, "text": True},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in range(count)
    ]
    try:
        ended = [run.communicate(timeout=900) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (_, errors) in zip(runs, ended, strict=True):
        assert run.returncode == 0, errors[-3000:]
    # But for what the collectives' library says.
    return ["\n".join(line for line in out.splitlines() if not line.startswith("[Gloo]")) for out, _ in ended]
