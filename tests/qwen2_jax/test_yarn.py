"""YaRN's numbers for Qwen2, and whole models with YaRN against transformers."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen2_jax.long_context import LongContext
from qwen2_jax.rope import inverse_frequencies
from qwen2_jax.sizes import PUBLISHED
from qwen2_jax.yarn import Yarn


def ratios(head_dim, factor):
    yarn = Yarn(factor, 32768)
    new, old = inverse_frequencies(head_dim, 1e6, yarn), inverse_frequencies(head_dim, 1e6)
    return new, new / old


@pytest.mark.parametrize(
    ("head_dim", "factor", "expected"),
    [
        (128, 4.0, {0: 1, 23: 1, 24: 0.955882353, 31: 0.647058824, 39: 0.294117647, 40: 0.25, 63: 0.25}),
        (128, 2.0, {23: 1, 24: 0.970588235, 31: 0.764705882, 39: 0.529411765, 40: 0.5, 63: 0.5}),
        (64, 4.0, {11: 1, 12: 0.916666667, 15: 0.666666667, 19: 0.333333333, 20: 0.25, 31: 0.25}),
    ],
)
def test_ramp(head_dim, factor, expected):
    _, ratio = ratios(head_dim, factor)
    for dimension, value in expected.items():
        np.testing.assert_allclose(ratio[dimension], value, rtol=1e-6)


def test_frequencies():
    new, _ = ratios(128, 4.0)
    np.testing.assert_allclose(new[[24, 31, 63]], [5.375321491e-3, 8.029597275e-4, 3.102344402e-7], rtol=1e-6)


@pytest.mark.parametrize(
    ("yarn", "scale"),
    [
        (Yarn(4.0, 32768), 1.138629436),
        (Yarn(2.0, 32768), 1.069314718),
        (Yarn(1.0, 32768), 1.0),
        (Yarn(4.0, 32768, attention_factor=1.5), 1.5),
        (Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=1.0), (0.0707 * np.log(40) + 1) / (0.1 * np.log(40) + 1)),
        (Yarn(4.0, 32768, mscale=0.707), 1.138629436),  # one of the two alone says nothing
    ],
)
def test_attention_scale(yarn, scale):
    np.testing.assert_allclose(yarn.attention_scale, scale, rtol=1e-9)


@pytest.mark.torch
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "block",
    [
        {"factor": 2.0, "original_max_position_embeddings": 64},
        {"factor": 4.0, "original_max_position_embeddings": 64},
        {"factor": 8.0, "original_max_position_embeddings": 32},
        {"factor": 4.0},
        {"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False, "attention_factor": 0.9},
        {"factor": 3.3, "original_max_position_embeddings": 48, "beta_fast": 16, "beta_slow": 2},
        {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 1.0},
    ],
)
def test_logits_equal_those_of_transformers(tmp_path, head_dim, block):
    from convert import load_checkpoint
    from qwen2_jax import Qwen2
    from tests.oracles import huggingface

    fields = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    rope = {"rope_type": "yarn", "rope_theta": 1e6, **block}
    reference = huggingface.build("dense", tmp_path, fields=fields, rope=rope)
    config, params = load_checkpoint(tmp_path)
    assert config.yarn is not None
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 200), dtype=np.int32)
    out = jax.jit(Qwen2(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(out.logits, reference.logits(tokens), atol=2e-4)


def test_factor_by_request():
    config, options = PUBLISHED["qwen2-7b-instruct"], LongContext("yarn")
    factors = {}
    for length in (1, 32768, 32769, 65536, 65537, 131072, 131073, 1 << 20):
        chosen = options.configure(config, length)
        factors[length] = None if chosen.yarn is None else chosen.yarn.factor
        assert chosen.max_length >= length
    assert list(factors.values()) == [None, None, 2, 2, 4, 4, 8, 32]
    assert options.configure(config, 100) == config
    with pytest.raises(ValueError, match="1048577 tokens are more than 32 times the trained length of 32768"):
        options.configure(config, (1 << 20) + 1)


def test_the_base_models_were_trained_on_less_than_they_declare():
    config = PUBLISHED["qwen2-7b"]
    assert config.max_position_embeddings == 131072
    assert LongContext("yarn").configure(config, 131072).yarn == Yarn(4.0, 32768)


def test_the_checkpoint_says_unless_the_run_does():
    config = dataclasses.replace(PUBLISHED["qwen2-7b-instruct"], yarn=Yarn(4.0, 32768, beta_fast=24.0))
    assert LongContext().configure(config, 100) == config
    assert LongContext(yarn_factor="auto").configure(config, 100).yarn is None
    assert LongContext(yarn_factor="auto").configure(config, 40000).yarn == Yarn(2.0, 32768, beta_fast=24.0)
    assert LongContext("plain").configure(config, 100).yarn is None
    fixed = dataclasses.replace(config, yarn=Yarn(4.0, 32768, attention_factor=1.5))
    assert LongContext(yarn_factor="auto").configure(fixed, 131072).yarn == fixed.yarn
    assert LongContext(yarn_factor="auto").configure(fixed, 40000).yarn == Yarn(2.0, 32768)
    assert LongContext(yarn_factor=8.0).configure(config, 100).yarn == Yarn(8.0, 32768, beta_fast=24.0)
