"""Logits stay on the device: no compiled program of an evaluation gives out a number for each word."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen2_jax import generation
from qwen2_jax.evaluation import perplexity, scoring
from qwen2_jax.evaluation.memory import Room
from qwen2_jax.evaluation.perplexity import loss_by_position
from qwen2_jax.evaluation.scoring import Scorer
from qwen2_jax.generation import Generation
from qwen2_jax.model import init_params
from tests.sharding.models import DENSE, MOE

VOCAB = 4999
"""No other dimension has this size, and [B, T, V] is larger than all that may be given out."""

WAYS_OUT = ("outfeed", "infeed", "callback", "send(", "recv(", "host_")


@pytest.fixture(params=["dense", "moe"])
def model(request):
    config = dataclasses.replace(MOE if request.param == "moe" else DENSE, max_position_embeddings=256)
    config = dataclasses.replace(config, vocab_size=VOCAB)
    return config, init_params(config, jax.random.key(0))


@pytest.fixture
def compiled(monkeypatch):
    """Programs by name, compiled with the very arguments that a run calls them with."""
    programs = {}

    def watch(module, name):
        original = getattr(module, name)

        def spy(*arguments, **options):
            programs.setdefault(name, []).append(original.lower(*arguments, **options).compile())
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, spy)

    watch(scoring, "_log_probabilities")
    watch(generation, "_prefill")
    watch(generation, "_decode")
    watch(perplexity, "_losses")
    return programs


def check(programs, most_bytes):
    assert programs
    for program in programs:
        shapes = [leaf.shape for leaf in jax.tree.leaves(program.out_info)]
        assert not [shape for shape in shapes if VOCAB in shape], shapes
        assert program.memory_analysis().output_size_in_bytes < most_bytes
        text = program.as_text()
        assert str(VOCAB) in text  # it does compute logits
        assert not [way for way in WAYS_OUT if way in text]


def some(rows, length):
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length), dtype=np.int32)


def test_scores(model, compiled):
    config, params = model
    questions = [(row[:40].tolist(), row[40:].tolist()) for row in some(8, 44)]
    shared = [(questions[0][0], [*rest, 1]) for _, rest in questions]
    scorer = Scorer(config, params, room=Room(512, 2048))
    assert len(dict(scorer.scores(questions + shared))) == 16
    assert {bool(shape.prefix) for shape, _ in scorer.work.shapes} == {True, False}
    check(compiled["_log_probabilities"], most_bytes=4 * VOCAB)


def test_answers(model, compiled):
    config, params = model
    Generation(config, params, some(2, 30), max_new_tokens=5).advance()
    # Besides the cache, with keys and values of 32 + 16 slots.
    cache = 2 * 2 * (32 + 16) * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * 4
    for name in ("_prefill", "_decode"):
        check(compiled[name], most_bytes=cache + 4 * VOCAB)


def test_losses(model, compiled):
    config, params = model
    loss_by_position(config, params, some(2, 64), piece=16)
    check(compiled["_losses"], most_bytes=4 * VOCAB)
