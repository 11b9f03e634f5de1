"""Scores equal those of one plain forward pass per request, whatever is shared, batched or split over devices."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.evaluation import memory, scoring
from qwen2_jax.evaluation.memory import Room, free_bytes, free_on_each, room_for, slot_bytes
from qwen2_jax.evaluation.scoring import Score, Scorer, score_continuations
from qwen2_jax.model import init_params, stack_layers
from sharding import make_mesh, param_shardings, run_options
from tests.sharding.models import DENSE, DUAL_CHUNK, MOE

CONFIGS = {
    "dense": dataclasses.replace(DENSE, max_position_embeddings=128),
    "moe": dataclasses.replace(MOE, max_position_embeddings=128, tie_word_embeddings=True),
    "dual-chunk": dataclasses.replace(DENSE, dual_chunk=DUAL_CHUNK),
    "prompt temperature": dataclasses.replace(
        DENSE, dual_chunk=DualChunk(10, 3, original_max_position_embeddings=16, temperature="prompt")
    ),
}


def requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Answers to shared questions, single tokens, long texts of their own, and the same request twice."""
    generator = np.random.default_rng(seed)

    def some(count: int) -> list[int]:
        return generator.integers(0, DENSE.vocab_size, count).tolist()

    examples = some(30)
    questions = [[*examples, *some(9)] for _ in range(4)] + [some(40), some(3)]
    pairs = [(question, some(length)) for question in questions for length in (1, 1, 4, 7)]
    pairs += [(some(2), some(50)), (some(60), some(2)), pairs[0]]
    return pairs


def reference(config: Qwen2Config, params, pairs) -> list[Score]:
    """One request at a time, all logits, summed in float64."""
    apply = jax.jit(lambda tokens, segments: Qwen2(config).apply({"params": params}, tokens, None, segments).logits)
    scores = []
    for context, continuation in pairs:
        tokens = [*context, *continuation][:-1]
        padded, segments = np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
        logits = np.asarray(apply(padded, segments), np.float64)[0, len(context) - 1 : len(tokens)]
        lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        chosen = logits[np.arange(len(logits)), continuation]
        scores.append(Score(float((chosen - lse).sum()), bool((logits.argmax(-1) == continuation).all())))
    return scores


def check(scores: list[Score], expected: list[Score]) -> None:
    np.testing.assert_allclose([s.log_likelihood for s in scores], [s.log_likelihood for s in expected], atol=2e-4)
    assert [s.greedy for s in scores] == [s.greedy for s in expected]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    params = init_params(config, jax.random.key(3))
    pairs = requests()
    # One that is greedy, so that the flag is not always false.
    context = pairs[0][0]
    logits = Qwen2(config).apply({"params": params}, np.asarray([context])).logits[0, -1]
    pairs.append((context, [int(logits.argmax())]))
    expected = reference(config, params, pairs)
    assert any(score.greedy for score in expected)
    return config, params, pairs, expected


@pytest.mark.parametrize("share", [True, False])
def test_equal_to_one_pass_per_request(model, share):
    config, params, pairs, expected = model
    scorer = Scorer(config, params, share=share, programs=3, room=Room(512, 2048))
    scores = dict(scorer.scores(pairs))
    check([scores[index] for index in range(len(pairs))], expected)
    if share and scorer.share:
        assert scorer.work.tokens < 0.7 * sum(len(context) + len(rest) - 1 for context, rest in pairs)


def test_stacked_layers_and_chunks_of_logits(model, monkeypatch):
    config, params, pairs, expected = model
    monkeypatch.setattr(scoring, "_LOGITS", 4 * config.vocab_size * 5)
    scorer = Scorer(config, stack_layers(params, config), programs=2)
    scores = dict(scorer.scores(pairs))
    check([scores[index] for index in range(len(pairs))], expected)


def test_on_a_mesh(model):
    config, params, pairs, expected = model
    mesh = make_mesh("fsdp=2,expert=2,tensor=2" if config.is_moe else "data=2,tensor=2,context=2")
    options = run_options(config, mesh, rules="serve")
    placed = jax.device_put(params, param_shardings(config, mesh))
    scorer = Scorer(config, placed, options=options, multiple=4, programs=2, room=Room(2048, 8192))
    scores = dict(scorer.scores(pairs))
    check([scores[index] for index in range(len(pairs))], expected)


def test_long_requests_lose_their_beginning():
    config = dataclasses.replace(DENSE, max_position_embeddings=128)
    params = init_params(config, jax.random.key(3))
    generator = np.random.default_rng(1)
    context, continuation = generator.integers(0, 64, 40).tolist(), generator.integers(0, 64, 6).tolist()
    scorer = Scorer(config, params, max_length=20)
    ((_, score),) = scorer.scores([(context, continuation)])
    check([score], reference(config, params, [(context[-15:], continuation)]))
    assert scorer.work.truncated == 1 and scorer.work.given == 15 + 6


def test_a_run_compiles_few_programs():
    config = dataclasses.replace(DENSE, max_position_embeddings=512, vocab_size=1000)
    params = init_params(config, jax.random.key(0))
    generator = np.random.default_rng(2)
    pairs = [
        (generator.integers(0, 64, length).tolist(), generator.integers(0, 64, 3).tolist())
        for length in generator.integers(1, 400, 60)
    ]
    before = scoring._log_probabilities._cache_size()
    scorer = Scorer(config, params, programs=3, room=Room(2048, 4096))
    assert len(dict(scorer.scores(pairs))) == len(pairs)
    assert scoring._log_probabilities._cache_size() - before == len(scorer.work.shapes) <= 3


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([1], [2]), ([], [3])], "pair 1 has no context"),
        ([([1], [64])], "token id 64 is outside the vocabulary of 64"),
        ([([1], [2] * 200)], "the continuation of pair 0 has 200 tokens, the model reads 128"),
    ],
)
def test_bad_pairs(pairs, message):
    config = CONFIGS["dense"]
    with pytest.raises(ValueError, match=message):
        score_continuations(config, init_params(config, jax.random.key(0)), pairs)


def test_bad_numbers():
    config = CONFIGS["dense"]
    params = init_params(config, jax.random.key(0))
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        Scorer(config, params, max_rows=0)
    with pytest.raises(ValueError, match="max_length is 129, the model has 128 positions"):
        Scorer(config, params, max_length=129)


def test_nan_is_no_score():
    config = CONFIGS["dense"]
    params = init_params(config, jax.random.key(0))
    params["norm"]["scale"] = params["norm"]["scale"] * np.float32("nan")
    with pytest.raises(ValueError, match="the model computes NaN"):
        score_continuations(config, params, [([1, 2], [3])])


def test_nothing_to_score():
    config = CONFIGS["dense"]
    params = init_params(config, jax.random.key(0))
    assert score_continuations(config, params, []) == []
    assert score_continuations(config, params, [([1], [])]) == [Score(0.0, True)]


def test_room_follows_free_memory():
    config = CONFIGS["dense"]
    params = init_params(config, jax.random.key(0))
    activation, cache = slot_bytes(config, "bfloat16")
    assert cache == 2 * 2 * 8 * 2 * 2  # keys and values, 2 heads of 8, 2 layers, 2 bytes
    small, large = (room_for(config, params, "bfloat16", free=free) for free in (100 * activation, 10**12))
    assert small.slots == 30 and large.slots == 4096
    assert room_for(config, params, "bfloat16", devices=4, free=10**12).slots == 4 * 4096
    assert room_for(config, params, "bfloat16", free=0) == Room(1, 1)
    assert free_bytes(jax.devices()[0]) > 0


def test_simulated_devices_share_the_memory(monkeypatch):
    """Of one device, and of a mesh of eight."""
    config = CONFIGS["dense"]
    params = init_params(config, jax.random.key(0))
    activation, _ = slot_bytes(config, "float32")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * 100 * activation)
    assert free_on_each(jax.devices()) == 100 * activation
    assert room_for(config, params, "float32").slots == 8 * 30
    mesh = make_mesh("data=8")
    placed = jax.device_put(params, param_shardings(config, mesh))
    assert room_for(config, placed, "float32", devices=8).slots == 8 * 30


def test_room_is_found_out_once(monkeypatch):
    """Batches of a second call have the shapes of the first, though results and programs take memory by then."""
    asked = []
    monkeypatch.setattr(scoring, "room_for", lambda *_: asked.append(1) or Room(512, 2048))
    config = CONFIGS["dense"]
    scorer = Scorer(config, init_params(config, jax.random.key(0)))
    for _ in range(2):
        list(scorer.scores([([1, 2], [3])]))
    assert len(asked) == 1 and len(scorer.work.shapes) == 1
