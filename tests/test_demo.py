"""`make demo`: its pieces, and all of it at a size where it takes a minute."""

import importlib.util
import math
import re
import shlex
import sys
from pathlib import Path

import jax
import pytest
import safetensors.numpy
import transformers

from qwen2_jax.cli import JOBS
from qwen2_jax.tokenizer import Tokenizer

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[1]
SOURCE = '"""A module."""\n\nimport os\n\n\nclass A:\n\tnames = ["é", "世界", 12.5]\n\n\ndef f(x):\n    return x\n'


@pytest.fixture
def demo(monkeypatch, tmp_path):
    for name, value in {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_pieces_are_the_library(demo, monkeypatch, tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(SOURCE * 100)
    (tmp_path / "c.txt").write_text("no module")
    pieces = demo.library(tmp_path)
    assert "".join(pieces) == 2 * (SOURCE * 100 + "\n\n")
    assert all(
        demo.PIECE <= len(piece) < demo.PIECE + len(SOURCE) + 2 for piece in pieces[:-1] if "x\n\n\n" not in piece
    )
    assert len(pieces) > 10


def test_both_read_the_tokenizer_alike(demo, tmp_path):
    demo.write_tokenizer(tmp_path / "tokenizer", [SOURCE])
    ours = Tokenizer.from_folder(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = f"{SOURCE}<|im_end|>\r\n  \t한국어 isn't 42<|endoftext|>"
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.eos_ids == (demo.MODEL.eos_token_id,) == (theirs.eos_token_id,)


def test_disagreements_are_found(demo):
    answers = [demo.Answers("def", [1, 2], [1, 2])]
    trained = {10: [5.0], 20: [4.0, 4.0], 30: [3.0]}
    assert demo.disagreements(trained, answers, 1e-5) == []
    for changed in (
        (trained | {20: [4.0, math.nextafter(4.0, 5.0)]}, answers, 1e-5),
        ({10: [5.0]}, answers, 1e-5),
        (trained, [*answers, demo.Answers("class", [1, 2], [1, 3])], 1e-5),
        (trained, answers, 1e-3),
        (trained, answers, math.nan),
    ):
        assert len(demo.disagreements(*changed)) == 1


def test_what_to_type_next_is_there(demo):
    """Wherever the environment is: it is the one that the demonstration ran in."""
    for line in demo.your_turn():
        job, *argv = shlex.split(re.sub(r"^(\w+=\w+ )*", "", line))
        assert Path(job) == Path(sys.executable).parent / "qwen2-jax"
        assert argv[0] in JOBS


def test_a_training_that_is_stuck_is_killed(demo, monkeypatch):
    monkeypatch.setattr(demo, "STUCK", 0.1)
    monkeypatch.setattr(demo, "RUN_FILE", (str(ROOT / "examples" / "demo.yaml"),))
    with pytest.raises(SystemExit, match="stuck"):
        demo.pretrain()


@pytest.mark.slow
def test_all_of_it(demo, monkeypatch, tmp_path, capfd):
    flags = "--steps 8 --warmup 2 --save-every 4 --log-every 1 --seq 32".split()
    monkeypatch.setattr(demo, "RUN_FILE", (str(ROOT / "examples" / "demo.yaml"), *flags))
    monkeypatch.setattr(demo, "KILL_AT", 6)
    with jax.numpy_dtype_promotion("standard"):
        assert demo.main() == 0
    shown = capfd.readouterr().out
    assert "kill -9" in shown and "Your turn" in shown
    assert demo.twice(demo.losses())

    step, hf = demo.RUN / "checkpoints" / "00000008", demo.WORK / "hf"
    weights = safetensors.numpy.load_file(hf / "model.safetensors")
    safetensors.numpy.save_file(
        weights | {"model.norm.weight": -weights["model.norm.weight"]}, hf / "model.safetensors"
    )
    answers, difference = demo.compare(step, hf)
    assert len(demo.disagreements(demo.losses(), answers, difference)) == 2
