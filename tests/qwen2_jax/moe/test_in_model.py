"""The routers' statistics and the options of the experts, in a whole model."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.layers import Options
from qwen2_jax.model import init_params, stack_layers
from qwen2_jax.moe import dropped_choices, load_balancing_loss, moe, with_capacity
from tests.qwen2_jax.shapes import MOE, SMALL

MIXED = Qwen2Config(**{**SMALL, "num_hidden_layers": 4}, **MOE, decoder_sparse_step=2)
SEGMENTS = np.array([[1] * 9 + [0] * 2, [0] * 4 + [1] * 7], np.int32)


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """What `Options.moe` may be, with a capacity of its own."""

    def __call__(self, x, routing, experts, capacity_factor):
        kept = routing if capacity_factor is None else with_capacity(routing, capacity_factor)
        return moe(x, kept, experts, "sorted"), dropped_choices(routing, kept)


@pytest.fixture(scope="module")
def params():
    return init_params(MIXED, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, MIXED.vocab_size, SEGMENTS.shape, dtype=np.int32)


def run(params, tokens, options=Options(), **fields):
    @jax.jit
    def apply(params):
        model = Qwen2(MIXED, options=options, **fields)
        return model.apply({"params": params}, tokens, segment_ids=SEGMENTS)

    return apply(params)


def test_one_row_of_statistics_for_each_sparse_layer(params, tokens):
    out = run(params, tokens)
    assert out.router.choices.shape == out.router.probability.shape == (2, 4)
    np.testing.assert_array_equal(out.router.rows, [16, 16])
    np.testing.assert_array_equal(out.router.choices.sum(axis=1), [32, 32])
    np.testing.assert_array_equal(out.router.dropped, [0, 0])
    assert np.all(out.router.entropy < 16 * np.log(4)) and not np.array_equal(*out.router.choices)
    np.testing.assert_allclose(out.aux_loss, load_balancing_loss(out.router), rtol=1e-6)
    for again in (run(stack_layers(params, MIXED), tokens), run(params, tokens, remat="full")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), again.router, out.router)


def test_a_dense_model_has_none():
    config = Qwen2Config(**SMALL)
    out = Qwen2(config).apply({"params": init_params(config, jax.random.key(0))}, np.ones((1, 3), np.int32))
    assert out.router is None and out.aux_loss == 0


def test_capacity_drops_and_counts(params, tokens):
    free = run(params, tokens)
    tight = run(params, tokens, Options(capacity_factor=0.5))
    # 0.5 * 22 tokens * 2 choices / 4 experts, padding included, leaves room for 6 tokens at each expert.
    first = np.maximum(np.asarray(free.router.choices[0]) - 6, 0).sum()
    assert tight.router.dropped[0] == first > 0
    np.testing.assert_array_equal(tight.router.choices[0], free.router.choices[0])
    assert not np.allclose(tight.logits, free.logits, atol=1e-3)
    callable_too = run(params, tokens, Options(moe=OneDevice(), capacity_factor=0.5))
    real = SEGMENTS != 0
    np.testing.assert_allclose(callable_too.logits[real], tight.logits[real], atol=1e-5)
    np.testing.assert_array_equal(callable_too.router.dropped, tight.router.dropped)
    roomy = run(params, tokens, Options(capacity_factor=4.0))
    np.testing.assert_allclose(roomy.logits[real], free.logits[real], atol=1e-5)


@pytest.mark.parametrize("name", ["loop", "ragged"])
def test_backends_agree(params, tokens, name):
    real = SEGMENTS != 0
    ours, other = run(params, tokens), run(params, tokens, Options(moe=name))
    np.testing.assert_allclose(other.logits[real], ours.logits[real], atol=2e-5)


def test_bad_options(params, tokens):
    for options, message in (
        (Options(moe="fast"), "moe must be one of loop, sorted, ragged, got 'fast'"),
        (Options(capacity_factor=-1.0), "capacity_factor must be positive, or None to drop nothing, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda options=options: run(params, tokens, options))
