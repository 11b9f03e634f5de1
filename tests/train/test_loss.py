"""The training loss equals that of transformers, and ignores what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import Output, Qwen2
from qwen2_jax.sizes import PUBLISHED
from train import IGNORE, next_token_loss, next_token_targets


@pytest.mark.torch
@pytest.mark.parametrize("variant", ["dense", "moe"])
def test_equals_transformers(variant, tmp_path):
    import torch

    from convert import load_checkpoint
    from tests.oracles import huggingface

    theirs = huggingface.build(variant, tmp_path)
    config, params = load_checkpoint(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 17), dtype=np.int32)
    extra = {"output_router_logits": True} if config.is_moe else {}
    expected = theirs.model(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long(), **extra).loss

    output = jax.jit(Qwen2(config).apply)({"params": params}, tokens)
    loss = next_token_loss(config, output, next_token_targets(tokens))
    np.testing.assert_allclose(loss.total, expected.item(), rtol=1e-5)
    assert loss.targets == 3 * 16
    assert (loss.total != loss.cross_entropy) == config.is_moe


def test_targets_stop_at_documents_and_padding():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0]], jnp.int32)
    assert next_token_targets(tokens).tolist() == [[6, 7, 8, 9, 0, IGNORE]]
    segments = jnp.array([[1, 1, 2, 2, 2, 0]], jnp.int32)
    assert next_token_targets(tokens, segments).tolist() == [[6, IGNORE, 8, 9, IGNORE, IGNORE]]


def test_ignored_targets_have_no_gradient():
    config = PUBLISHED["qwen2-0.5b"]

    def total(logits):
        output = Output(logits, hidden=None, cache=None, aux_loss=jnp.zeros(()))
        return next_token_loss(config, output, jnp.array([[1, IGNORE, 2]], jnp.int32)).total

    gradient = jax.grad(total)(jax.random.normal(jax.random.key(0), (1, 3, 7)))
    assert np.abs(gradient[0, 0]).max() > 0
    assert np.all(gradient[0, 1] == 0)
