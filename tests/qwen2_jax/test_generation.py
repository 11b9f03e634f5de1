"""Generation: buckets, streaming, endings, sampling, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import Generation, Qwen2, Qwen2Config, generate, stream
from qwen2_jax import generation as module
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.generation import Prefixes
from qwen2_jax.model import init_params, stack_layers
from qwen2_jax.sampling import Sampling, next_token
from tests.qwen2_jax.shapes import SMALL

CONFIG = Qwen2Config(**SMALL, max_position_embeddings=256, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 20), dtype=np.int32)


def by_whole_passes(params, prompt, new):
    """Greedy tokens the slow way: the whole text again for every token."""
    run = jax.jit(lambda tokens, segments: Qwen2(CONFIG).apply({"params": params}, tokens, segment_ids=segments).logits)
    text = np.zeros((1, len(prompt) + new), np.int32)
    text[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + new):
        segments = (np.arange(text.shape[1]) < length).astype(np.int32)[None]
        text[0, length] = run(text, segments)[0, length - 1].argmax()
    return text[0, len(prompt) :]


def test_equals_whole_passes(params, tokens):
    lengths = [20, 3, 11]
    answer = generate(CONFIG, params, tokens, lengths, max_new_tokens=24)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(answer[row], by_whole_passes(params, tokens[row, :length], 24))
    stacked = generate(CONFIG, stack_layers(params, CONFIG), tokens, lengths, max_new_tokens=24)
    np.testing.assert_array_equal(stacked, answer)


@pytest.mark.parametrize("chunks", [(None, None), (8, 4)])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_shared_beginnings(params, tokens, chunks, penalty):
    """Read once, they give the tokens that whole prompts give: three that share two, and one that shares nothing."""
    beginnings, lengths, of = tokens[:2, :11], [11, 6], [1, 0, 1, 2]
    rest = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (4, 7), dtype=np.int32)
    own = [7, 1, 3, 5]
    prompts = np.zeros((4, 18), np.int32)
    whole = [lengths[begin] + length if begin < 2 else length for begin, length in zip(of, own, strict=True)]
    for row, (begin, length) in enumerate(zip(of, own, strict=True)):
        shared = beginnings[begin, : lengths[begin]] if begin < 2 else []
        prompts[row, : whole[row]] = [*shared, *rest[row, :length]]
    expected = generate(CONFIG, params, prompts, whole, max_new_tokens=24, repetition_penalty=penalty)
    beginnings = np.concatenate([beginnings, np.full((1, 11), -7)])
    prefixes = Prefixes(beginnings, [*lengths, 0], of)
    how = dict(max_new_tokens=24, sampling=Sampling(repetition_penalty=penalty))
    how |= dict(prefill_chunk=chunks[0], prefix_chunk=chunks[1])
    run = Generation(CONFIG, params, rest, own, prefixes=prefixes, **how)
    np.testing.assert_array_equal(run.advance(), expected)
    stacked = Generation(CONFIG, stack_layers(params, CONFIG), rest, own, prefixes=prefixes, **how)
    np.testing.assert_array_equal(stacked.advance(), expected)


def test_shared_beginnings_are_checked(params, tokens):
    with pytest.raises(ValueError, match="a prompt of 240 tokens and 17 new ones need 257 positions"):
        long = Prefixes(np.zeros((1, 235), np.int32), [235], [0])
        Generation(CONFIG, params, tokens[:1, :5], prefixes=long, max_new_tokens=17)
    for prefixes, message in (
        (Prefixes([[-1]], [1], [0]), "outside the vocabulary"),
        (Prefixes([[1]], [1], [0, 0]), r"integers of shapes \[P, W\], \[P\] and \[1\], got int64 of shape \(1, 1\)"),
        (Prefixes([[1.5]], [1], [0]), "got float64"),
        (Prefixes([[1]], [2], [0]), r"have 0 to 1 tokens and numbers from 0 to 0, got \[2\]"),
        (Prefixes([[1]], [1], [1]), r"and \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Generation(CONFIG, params, tokens[:1], prefixes=prefixes)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Generation(CONFIG, params, tokens[:1], prefixes=Prefixes([[1]], [1], [0]), prefix_chunk=0)
    scaled = dataclasses.replace(CONFIG, dual_chunk=DualChunk(64, 16, 32, temperature="prompt"))
    with pytest.raises(ValueError, match="makes the same beginning another one in each prompt"):
        Generation(scaled, params, tokens[:1], prefixes=Prefixes([[1]], [1], [0]))


def test_padding_content_does_not_matter(params, tokens):
    other = tokens.copy()
    other[1, 3:] = -7
    one, two = (generate(CONFIG, params, rows, [20, 3, 11], max_new_tokens=6) for rows in (tokens, other))
    np.testing.assert_array_equal(one, two)


def test_streaming_gives_the_same_tokens(params, tokens):
    options = dict(max_new_tokens=21, sampling=Sampling(temperature=1.0, top_k=9), seed=4)
    whole = Generation(CONFIG, params, tokens[:1], **options).advance()[0]
    assert list(stream(Generation(CONFIG, params, tokens[:1], **options))) == whole.tolist()
    run = Generation(CONFIG, params, tokens[:1], **options)
    parts = [run.advance(size) for size in (1, 5, 2, 99)]
    assert [part.shape for part in parts] == [(1, 1), (1, 5), (1, 2), (1, 13)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1)[0], whole)
    assert run.done


def test_rows_end_at_their_first_end_token(params, tokens):
    free = generate(CONFIG, params, tokens, max_new_tokens=30)
    ends = [int(free[0, 4]), int(free[1, 2])]
    got = generate(CONFIG, params, tokens, max_new_tokens=30, eos_ids=ends, pad_id=49)
    longest = 0
    for row, answer in zip(got, free, strict=True):
        at = np.flatnonzero(np.isin(answer, ends))
        length = at[0] + 1 if len(at) else 30
        longest = max(longest, length)
        np.testing.assert_array_equal(row[:length], answer[:length])
        assert np.all(row[length:] == 49)
    assert got.shape[1] == longest


def test_damaged_weights_are_noticed(params, tokens):
    damaged = {**params, "norm": {"scale": params["norm"]["scale"].at[3].set(jnp.nan)}}
    with pytest.raises(ValueError, match="the model computes NaN or infinity"):
        generate(CONFIG, damaged, tokens, max_new_tokens=4)


def test_each_row_has_its_own_limit(params, tokens):
    whole = generate(CONFIG, params, tokens, max_new_tokens=9)
    limits = [9, 2, 5, 1, 9, 9][: len(tokens)]
    got = generate(CONFIG, params, tokens, max_new_tokens=limits, pad_id=49)
    for row, limit in enumerate(limits):
        np.testing.assert_array_equal(got[row, :limit], whole[row, :limit])
        assert (got[row, limit:] == 49).all()


def test_only_one_prompt_is_streamed(params, tokens):
    with pytest.raises(ValueError, match="only one prompt can be streamed, got"):
        next(stream(Generation(CONFIG, params, tokens, max_new_tokens=2)))


def test_few_programs_for_many_lengths(params):
    tokens = np.ones((1, 60), np.int32)
    before = module._prefill._cache_size(), module._decode._cache_size()
    for length in range(33, 49):
        generate(CONFIG, params, tokens, [length], max_new_tokens=4)
    assert module._prefill._cache_size() - before[0] == 1
    assert module._decode._cache_size() - before[1] <= 2


def test_sampling_values_need_no_new_program(params, tokens):
    generate(CONFIG, params, tokens, temperature=0.5, top_p=0.9, max_new_tokens=4)
    before = module._decode._cache_size()
    for temperature, top_p in ((0.7, 0.5), (1.3, 0.2)):
        generate(CONFIG, params, tokens, temperature=temperature, top_p=top_p, max_new_tokens=4)
    assert module._decode._cache_size() == before


def test_buckets_waste_at_most_a_quarter():
    lengths = np.arange(1, 40_000)
    buckets = np.array([module.bucket(int(length)) for length in lengths])
    assert np.all(buckets >= lengths)
    assert np.all(np.diff(buckets) >= 0)
    assert np.all((buckets - lengths)[64:] <= 0.25 * buckets[64:])
    assert len(set(buckets)) < 50


def test_same_seed_same_tokens(params, tokens):
    one, same, other = (
        generate(CONFIG, params, tokens, temperature=1.0, max_new_tokens=12, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def sampled(logits, count=4000, seen=None, **options):
    sampling = Sampling(**options)
    keys = jax.random.split(jax.random.key(0), count)
    draw = jax.jit(jax.vmap(lambda key: next_token(logits, key, seen, sampling.steps, sampling.values)[0]))
    return np.bincount(draw(keys), minlength=logits.shape[1]) / count


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(temperature=1.0, top_k=3),
        dict(temperature=1.5, top_p=0.6),
        dict(temperature=0.7, top_k=5, top_p=0.8, repetition_penalty=1.3),
        dict(temperature=1.0, top_k=99, top_p=0.05),
    ],
)
def test_distribution_equals_that_of_transformers(options):
    import torch
    from transformers import generation as theirs

    logits = np.random.default_rng(3).normal(size=(1, 12)).astype(np.float32) * 2
    prompt = torch.tensor([[1, 4, 4, 7]])
    processors = theirs.LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0)),
            theirs.TemperatureLogitsWarper(options["temperature"]),
            theirs.TopKLogitsWarper(options.get("top_k", 12)),
            theirs.TopPLogitsWarper(options.get("top_p", 1.0)),
        ]
    )
    expected = torch.softmax(processors(prompt, torch.from_numpy(logits)), -1)[0].numpy()
    seen = jnp.zeros((1, 12), bool).at[0, np.array([1, 4, 7])].set(True)
    got = sampled(jnp.asarray(logits), seen=seen, **options)
    assert np.all((got > 0) <= (expected > 0))
    np.testing.assert_allclose(got, expected, atol=0.03)


def test_penalty_counts_prompt_and_answer(params, tokens):
    """With a huge penalty no token comes twice, and none of the prompt's."""
    answer = generate(CONFIG, params, tokens[:1, :10], max_new_tokens=20, repetition_penalty=1e6)[0]
    assert len(set(answer.tolist())) == 20
    assert not set(answer.tolist()) & set(tokens[0, :10].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=np.zeros((1, 0), np.int32)), "every prompt must have 1 to 0 tokens"),
        (dict(tokens=np.zeros((0, 4), np.int32)), "lengths must hold a whole number for each of 0 prompts"),
        (dict(lengths=[0, 1, 2]), "every prompt must have 1 to 20 tokens, got lengths from 0 to 2"),
        (dict(lengths=[21, 1, 2]), "got lengths from 1 to 21"),
        (dict(lengths=[3]), "a whole number for each of 3 prompts"),
        (dict(tokens=np.full((1, 3), 50)), "token id 50 is outside the vocabulary of 50"),
        (dict(tokens=np.full((1, 3), -1)), "token id -1 is outside"),
        (dict(tokens=np.ones((1, 3))), "tokens must be integers of shape .batch, length., got float64"),
        (dict(tokens=np.ones(3, np.int32)), r"got int32 of shape \(3,\)"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(max_new_tokens=237), "need 257 positions, the model has 256"),
        (dict(temperature=-1.0), "temperature must be 0 or more, got -1.0"),
        (dict(top_k=-1), "top_k must be 0 or more"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(top_p=float("nan")), "top_p must be above 0"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be above 0"),
    ],
)
def test_refuses(params, tokens, change, message):
    with pytest.raises(ValueError, match=message):
        generate(CONFIG, params, **{"tokens": tokens, **change})
