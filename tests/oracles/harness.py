"""Small tasks of every kind for lm-evaluation-harness, with data of their own."""

import json
import shutil
from pathlib import Path

import numpy as np

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
