"""Logits, load-balancing loss and greedy tokens equal those of transformers."""

import contextlib
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import load_checkpoint
from qwen2_jax import Qwen2, Qwen2Config, generate
from qwen2_jax.model import stack_layers
from tests.oracles import huggingface
from tests.xla import optimized

pytestmark = pytest.mark.torch

ROWS, LENGTH = 3, 21
OPTIMIZED = ("dense", "moe")
"""Compiled as users' programs are, which takes four times as long."""


@dataclasses.dataclass
class Pair:
    """One model in both frameworks."""

    theirs: huggingface.Reference
    config: Qwen2Config
    params: Any
    tokens: np.ndarray

    def run(self, tokens, **arguments):
        return _run(self.config, self.params, tokens, **arguments)


@partial(jax.jit, static_argnums=0)
def _run(config, params, tokens, **arguments):
    return Qwen2(config).apply({"params": params}, tokens, **arguments)


@pytest.fixture(scope="module", params=huggingface.VARIANTS)
def pair(request, tmp_path_factory):
    theirs = huggingface.build(request.param, tmp_path_factory.mktemp("hf"))
    config, params = load_checkpoint(theirs.folder)
    rng = np.random.default_rng(len(request.param))
    with optimized() if request.param in OPTIMIZED else contextlib.nullcontext():
        yield Pair(theirs, config, params, rng.integers(0, config.vocab_size, (ROWS, LENGTH), dtype=np.int32))


def test_logits(pair):
    theirs = pair.theirs.logits(pair.tokens)
    np.testing.assert_allclose(pair.run(pair.tokens).logits, theirs, atol=2e-4, rtol=0)


def test_aux_loss(pair):
    if not pair.config.is_moe:
        assert pair.run(pair.tokens).aux_loss == 0
        return
    assert abs(pair.run(pair.tokens).aux_loss - pair.theirs.aux_loss(pair.tokens)) <= 1e-5
    real = np.arange(LENGTH)[None] < np.array([LENGTH, 5, 13])[:, None]
    out = pair.run(pair.tokens, segment_ids=real.astype(np.int32))
    assert abs(out.aux_loss - pair.theirs.aux_loss(pair.tokens, real)) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_rows(pair, side):
    lengths = [LENGTH, 5, 13]
    tokens, segments = np.full_like(pair.tokens, pair.config.vocab_size - 1), np.zeros_like(pair.tokens)
    for row, length in enumerate(lengths):
        place = slice(LENGTH - length, None) if side == "left" else slice(length)
        tokens[row, place], segments[row, place] = pair.tokens[row, :length], 1
    logits = pair.run(tokens, segment_ids=segments).logits
    for row, length in enumerate(lengths):
        place = slice(LENGTH - length, None) if side == "left" else slice(length)
        single = pair.theirs.logits(pair.tokens[row : row + 1, :length])[0]
        np.testing.assert_allclose(logits[row, place], single, atol=2e-4, rtol=0)


def test_greedy_tokens(pair):
    lengths = [LENGTH, 5, 13]
    # Stacked layers compile faster, which matters for experts; the dense models go through the other form.
    params = stack_layers(pair.params, pair.config) if pair.config.is_moe else pair.params
    ours = generate(pair.config, params, pair.tokens, lengths, max_new_tokens=64)
    for row, length in enumerate(lengths):
        theirs = pair.theirs.generate(pair.tokens[row, :length], 64)
        np.testing.assert_array_equal(ours[row], theirs)


BFLOAT16 = {
    "dense": ["dense", "tied", "wide heads", "14 heads over 2", "six layers, tied"] * 2,
    # A choice of experts may turn on a rounding, so a single model says little.
    "moe": ["moe", "moe, normalised", "moe, tied", "moe, every second layer", "moe, 16 narrow experts"] * 3,
}


@pytest.mark.parametrize("kind", BFLOAT16)
def test_bfloat16_error_is_no_worse_than_torch(tmp_path, kind):
    """Root mean square over several models, each framework against its own float32."""
    ours, theirs = [], []
    for seed, variant in enumerate(BFLOAT16[kind]):
        reference = huggingface.build(variant, tmp_path / str(seed), seed)
        config, params = load_checkpoint(tmp_path / str(seed), dtype=jnp.bfloat16)
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (4, 32), dtype=np.int32)
        # Both float32 runs use the weights as bfloat16 has them, so that only the arithmetic differs.
        reference.model.to(torch.bfloat16)
        rough = reference.logits(tokens)
        reference.model.to(torch.float32)
        exact = reference.logits(tokens)
        theirs.append(np.square(rough - exact).mean() / np.square(exact).mean())
        with optimized():
            mine = np.asarray(_run(config, params, tokens).logits)
        ours.append(np.square(mine - exact).mean() / np.square(exact).mean())
    assert np.sqrt(np.mean(ours)) <= 1.25 * np.sqrt(np.mean(theirs))
