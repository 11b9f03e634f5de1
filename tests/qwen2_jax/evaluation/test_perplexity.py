"""Loss by position against a float64 softmax of all logits at once, and how it is summed up."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.evaluation.perplexity import (
    bucket_means,
    cut_windows,
    loss_by_position,
    loss_table,
    place_table,
    slide_windows,
    total_loss,
)
from qwen2_jax.model import Qwen2, stack_layers
from qwen2_jax.yarn import Yarn

WAYS = {
    "plain": {},
    "yarn": {"yarn": Yarn(4.0, 16)},
    "dca": {"dual_chunk": DualChunk(12, 4)},
    "dca-temperature": {"dual_chunk": DualChunk(12, 4, original_max_position_embeddings=16)},
    "dca-temperature of the prompt": {"dual_chunk": DualChunk(12, 4, 16, "prompt")},
}


@pytest.fixture(scope="module")
def tokens(config):
    return np.asarray(jax.random.randint(jax.random.key(1), (2, 45), 0, config.vocab_size))


def expected(config, params, tokens):
    logits = np.asarray(Qwen2(config).apply({"params": params}, tokens).logits, np.float64)
    chosen = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return np.log(np.exp(logits[:, :-1]).sum(axis=-1)) - chosen


@pytest.mark.parametrize("way", WAYS)
def test_loss_is_that_of_a_float64_softmax_whatever_the_piece(way, config, params, tokens):
    config = dataclasses.replace(config, **WAYS[way])
    wanted = expected(config, params, tokens)
    for piece in (7, 100):
        losses = loss_by_position(config, params, tokens, piece=piece)
        assert (losses.shape, losses.dtype) == ((2, 44), np.float32)
        np.testing.assert_allclose(losses, wanted, rtol=2e-5, atol=2e-5)


def test_other_heads_and_forms(config, params, tokens):
    config = dataclasses.replace(config, tie_word_embeddings=False)
    head = jax.random.normal(jax.random.key(2), params["embed"]["embedding"].shape)
    params = {**params, "lm_head": {"kernel": head}}
    wanted = expected(config, params, tokens)
    np.testing.assert_allclose(loss_by_position(config, params, tokens, piece=16), wanted, rtol=2e-5, atol=2e-5)
    stacked = loss_by_position(config, stack_layers(params, config), tokens, piece=16)
    np.testing.assert_allclose(stacked, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "tokens, piece, complaint",
    [
        ([1, 2], 4, r"integers of shape \[batch, length\], got int64 of shape \(2,\)"),
        ([[0.5, 1.0]], 4, "got float64"),
        ([[1]], 4, "at least 2"),
        ([[1, 272]], 4, "272 is outside the vocabulary of 272"),
        ([[1, -1]], 4, "-1 is outside"),
        ([[1] * 129], 4, "129 tokens are more than the model's 128 positions"),
        ([[1, 2]], 0, "at least 1 position, got 0"),
    ],
)
def test_what_has_no_loss(tokens, piece, complaint, config, params):
    with pytest.raises(ValueError, match=complaint):
        loss_by_position(config, params, tokens, piece=piece)


def test_windows_are_spread_and_apart():
    np.testing.assert_array_equal(cut_windows(range(23), 5, 3), [range(5), range(7, 12), range(15, 20)])
    np.testing.assert_array_equal(cut_windows(range(10), 5, 2), [range(5), range(5, 10)])
    with pytest.raises(ValueError, match="the text has 9 tokens, 2 windows of 5 need 10"):
        cut_windows(range(9), 5, 2)
    with pytest.raises(ValueError, match="at least 1 window"):
        cut_windows(range(9), 5, 0)


def test_tables():
    losses = np.asarray([[1, 3, 5, 7, 9], [3, 5, 7, 9, 11]], np.float32)
    means = bucket_means(losses, 2)
    np.testing.assert_array_equal(means, [[2, 6, 9], [4, 8, 11]])
    rows = loss_table({"plain": means, "dca": means[:1]}, 2, 5)
    assert [(row["mode"], row["first"], row["last"], row["loss"]) for row in rows] == [
        *(("plain", 1, 2, 3), ("plain", 3, 4, 7), ("plain", 5, 5, 10)),
        *(("dca", 1, 2, 2), ("dca", 3, 4, 6), ("dca", 5, 5, 9)),
    ]
    assert rows[0]["loss_error"] == pytest.approx(1) and rows[3]["loss_error"] is None
    assert rows[0]["perplexity"] == pytest.approx(np.exp(3))


def test_sliding_windows_count_every_token_once():
    for size, length, stride in ((23, 5, 2), (23, 5, 4), (25, 5, 4), (10, 5, 1), (7, 9, 3), (2, 5, 4), (9, 9, 8)):
        windows, counted = slide_windows(range(size), length, stride)
        assert windows.shape == (len(counted), min(size, length))
        ends = [window[len(window) - count :].tolist() for window, count in zip(windows, counted, strict=True)]
        assert list(itertools.chain(*ends)) == [*range(1, size)]
        assert all(count <= stride for count in counted[1:]) and counted[0] == windows.shape[1] - 1
        assert [window[0] for window in windows[:-1]] == [*range(0, stride * (len(windows) - 1), stride)]
    for stride in (0, 5):
        with pytest.raises(ValueError, match=f"the stride must be from 1 to 4, .* got {stride}"):
            slide_windows(range(9), 5, stride)
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        slide_windows([1], 5, 2)


def test_parts_of_a_text():
    rows = place_table({"plain": np.asarray([1.0, 4.0, 7.0])}, np.asarray([3, 1, 2]), 2)
    assert [(row["first"], row["last"], row["loss"]) for row in rows] == [(1, 4, 1.75), (5, 6, 7.0)]
    whole = total_loss(12 * np.log(2), 6, 24)
    assert (whole["bits_per_token"], whole["bits_per_byte"]) == (pytest.approx(2), pytest.approx(0.5))
    assert whole["perplexity"] == pytest.approx(4)
