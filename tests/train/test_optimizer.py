"""AdamW as we train with it is PyTorch's, and stores what it is told to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert import load_checkpoint
from qwen2_jax.model import abstract_params, stack_layers
from tests.sharding.models import MOE
from train.loss import next_token_targets
from train.objective import Step
from train.optimizer import adamw, decays, sgd
from train.pretraining import Batch
from train.schedule import LearningRate
from train.step import make_train_step, new_state

UPDATES = 200


@pytest.mark.torch
def test_200_steps_equal_pytorch(tmp_path):
    import torch

    from tests.oracles import huggingface

    def factor(n):
        done = (n - 20) / (UPDATES - 20)
        return (n + 1) / 20 if n < 20 else 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done))

    theirs = huggingface.build("dense", tmp_path).model
    config, params = load_checkpoint(tmp_path)
    batches = np.random.default_rng(0).integers(0, config.vocab_size, (UPDATES // 10, 4, 24), dtype=np.int32)

    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    rates = torch.optim.lr_scheduler.LambdaLR(adam, factor)
    step = make_train_step(config, adamw(LearningRate(1e-3, warm_up=20).over(UPDATES)), Step(jnp.float32, "none"))
    state = new_state(adamw(1e-3), stack_layers(params, config))

    losses, expected = [], []
    for n in range(UPDATES):
        tokens = batches[n % len(batches)]
        loss = theirs(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long()).loss
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        rate = rates.get_last_lr()[0]
        adam.step()
        rates.step()
        state, metrics = step(state, Batch(tokens, next_token_targets(jnp.asarray(tokens))))
        losses.append(float(metrics.loss))
        expected.append(loss.item())
        np.testing.assert_allclose(metrics.learning_rate, rate, rtol=1e-6)
        np.testing.assert_allclose(metrics.gradient_norm, norm.item(), rtol=1e-2)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == optax.tree.get(state.optimizer, "updates") == UPDATES


def test_norms_and_biases_do_not_decay():
    marks = decays(abstract_params(MOE))
    layer = marks["layers_0"]
    assert not any(jax.tree.leaves([marks["norm"], layer["attn_norm"], layer["mlp_norm"], layer["attn"]["q"]["bias"]]))
    assert all(jax.tree.leaves([marks["embed"], marks["lm_head"], layer["moe"], layer["attn"]["q"]["kernel"]]))


@pytest.mark.parametrize(
    "first, second, tolerance",
    [(jnp.float32, jnp.float32, 0), (jnp.bfloat16, jnp.float32, 5e-3), (jnp.bfloat16, jnp.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
def test_moments_have_their_own_dtypes(weights, first, second, tolerance):
    """Whatever is stored, an update is computed in float32: it differs by the rounding of what is stored."""
    params = {"kernel": jnp.linspace(-1, 1, 64, dtype=jnp.float32).astype(weights)}
    gradients = {"kernel": jnp.linspace(0.5, -0.2, 64, dtype=jnp.float32)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    exact, ours = adamw(1e-2), adamw(1e-2, moments_dtype=first, second_moments_dtype=second)
    exact_state, state = exact.init(wide), ours.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(5):
            wanted, exact_state = exact.update(gradients, exact_state, wide)
            updates, state = ours.update(gradients, state, params)
            assert [optax.tree.get(state, name)["kernel"].dtype for name in ("mu", "nu")] == [first, second]
            assert updates["kernel"].dtype == jnp.float32
            np.testing.assert_allclose(updates["kernel"], wanted["kernel"], rtol=tolerance, atol=tolerance * 1e-2)


def test_the_rate_is_that_of_updates_made():
    with jax.numpy_dtype_promotion("standard"):
        for make in (adamw, sgd):
            optimizer = make(lambda n: 1 / (1 + n.astype(jnp.float32)))
            params = {"kernel": jnp.ones(3)}
            state = optimizer.init(params)
            for n in range(3):
                _, state = optimizer.update(params, state, params)
                assert optax.tree.get(state, "learning_rate") == np.float32(1 / (1 + n))
                assert optax.tree.get(state, "updates") == n + 1
