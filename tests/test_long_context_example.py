"""The pieces of examples/long_context.py, at a size where they take seconds."""

import dataclasses
import importlib.util
import json
import random
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from convert import load_checkpoint
from qwen2_jax.evaluation.modes import reaching
from qwen2_jax.evaluation.perplexity import loss_by_position
from qwen2_jax.long_context import LongContext
from qwen2_jax.model import init_params
from qwen2_jax.tokenizer import Tokenizer
from train import IGNORE

TEXTS = [("def f(x):\n    return x + 1\n\n" * 40), ("class A:\n    pass  # é\n" * 40)]


@pytest.fixture
def example(monkeypatch):
    path = Path(__file__).parents[1] / "examples" / "long_context.py"
    spec = importlib.util.spec_from_file_location("long_context_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {
        "TRAINED": 64,
        "SHORT": 32,
        "TOKENS": 128,
        "LENGTHS": (64, 128, 256),
        "DEPTHS": (0.0, 1.0),
        "BUCKET": 32,
        "CONFIG": dataclasses.replace(
            module.CONFIG,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
        ),
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_a_byte_is_its_own_id(example, tmp_path):
    example.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "héllo\n\t日本 \x00\x7f"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(range(128)) == bytes(range(128)).decode()
    assert tokenizer.encode("<|endoftext|>") == [256] == list(tokenizer.eos_ids)
    assert tokenizer.vocab_size == example.CONFIG.vocab_size


@pytest.mark.parametrize("length", [64, 256])
@pytest.mark.parametrize("kind", ["text", "needle", "pairs", "copy"])
def test_windows_ask_only_for_what_can_be_known(example, monkeypatch, kind, length):
    monkeypatch.setattr(example, "MIXTURES", ({kind: 1.0},) * 2)
    monkeypatch.setattr(example, "TOKENS", 16 * length)
    tokens, targets = example.Windows(TEXTS).batch(length)
    assert tokens.shape == targets.shape == (16, length)
    counted = targets != IGNORE
    assert np.array_equal(targets[:, :-1][counted[:, :-1]], tokens[:, 1:][counted[:, :-1]])
    for row, known in zip(tokens, counted, strict=True):
        line = bytes(row[1:].tolist())
        if kind == "text":
            assert known.all() and line.decode(errors="ignore").strip("\ufffd") in "\n".join(TEXTS)
        elif kind == "copy":
            first = int(known.argmax()) + 1
            assert all(line[i - 1] == row[i - first] for i in range(first, length))
        else:  # a number counts exactly where its name has come before
            for found in re.finditer(rb"(?<![a-z])([a-z]{4} = )(\d{4})", line):
                again = bytes(row[: found.start() + 1].tolist()).find(found[1] + found[2]) >= 0
                assert known[found.start(2) : found.end(2)].all() == again


@pytest.mark.slow
def test_training_makes_a_checkpoint_that_can_be_measured(example, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "library_sources", lambda: (TEXTS, TEXTS))
    monkeypatch.setattr(example, "MODES", {"dca": example.MODES["dca"]})
    monkeypatch.setattr(example, "LENGTHS", (64, 128))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam relies on it
        example.main(tmp_path, steps=4, windows=1, samples=1)
    config, params = load_checkpoint(tmp_path / "model")
    assert config == example.CONFIG
    untrained = init_params(config, jax.random.key(0))
    assert not np.array_equal(params["embed"]["embedding"], untrained["embed"]["embedding"])
    for name, modes in {"loss": 2, "needle": 1, "pairs": 1}.items():
        table = json.loads((tmp_path / f"{name}.json").read_text())["table"]
        assert len({row["mode"] for row in table}) == modes
        assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_each_position_is_read_as_in_the_shortest_request_that_holds_it(example):
    config = example.CONFIG
    params = init_params(config, jax.random.key(0))
    windows = np.asarray([random.Random(0).choices(range(256), k=256)], np.int32)
    mode = LongContext("yarn", yarn_factor="auto")
    losses = example.request_losses(config, params, mode, windows)
    assert losses.shape == (1, 255)
    for first, last in ((0, 63), (63, 127), (127, 255)):
        configured = reaching(config, mode, last + 1)
        expected = loss_by_position(configured, params, windows[:, : last + 1])
        np.testing.assert_allclose(losses[:, first:last], expected[:, first:last], atol=1e-5)

    truncated = example.truncated_losses(config, params, windows)
    assert truncated.shape == (1, 255)
    np.testing.assert_allclose(truncated[:, :63], loss_by_position(config, params, windows[:, :64]), atol=1e-5)
    expected = loss_by_position(config, params, windows[:, 96:160])
    np.testing.assert_allclose(truncated[:, 127:159], expected[:, 31:63], atol=1e-5)
