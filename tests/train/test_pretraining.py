"""Loss and gradients of packed rows equal those that transformers finds for their documents, each in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import load_checkpoint
from qwen2_jax.model import stack_layers
from tests.oracles import huggingface
from train.loss import IGNORE, next_token_targets
from train.objective import Step
from train.pretraining import Batch, Pretraining
from train.step import loss_and_gradients

pytestmark = pytest.mark.torch

LENGTH = 17
MICRO_BATCHES = (((7, 9), (17,)), ((5, 5, 7), (12,)))
"""Lengths of documents, by micro-batch and row; the rest of a row is padding. 30 targets and 25."""
SMALL = {"num_hidden_layers": 2}
# The coefficient is large enough for a wrong gradient to show.
MODELS = {"dense": SMALL, "tied": SMALL, "moe": {**SMALL, "router_aux_loss_coef": 0.5}}


def documents(vocabulary: int) -> list[list[list[np.ndarray]]]:
    """Tokens, by micro-batch, row and document."""
    dice = np.random.default_rng(0)
    return [[[dice.integers(1, vocabulary, n) for n in row] for row in rows] for rows in MICRO_BATCHES]


def packed(micro_batches) -> Batch:
    """[2, 2, LENGTH]."""
    tokens, segments = np.zeros((2, 2, 2, LENGTH), np.int32)
    for place in np.ndindex(2, 2):
        row = micro_batches[place[0]][place[1]]
        together = np.concatenate(row)
        tokens[place][: len(together)] = together
        segments[place][: len(together)] = np.repeat(np.arange(len(row)) + 1, [len(one) for one in row])
    targets = jax.vmap(next_token_targets)(jnp.asarray(tokens), jnp.asarray(segments))
    return Batch(jnp.asarray(tokens), targets, jnp.asarray(segments))


def of_transformers(model, rows, extra) -> tuple[torch.Tensor, int]:
    """The mean loss of documents, padded on the right, and how many targets count."""
    every = [document for row in rows for document in row]
    tokens, labels = torch.zeros(len(every), LENGTH, dtype=torch.long), torch.full((len(every), LENGTH), IGNORE)
    for place, document in enumerate(every):
        tokens[place, : len(document)] = labels[place, : len(document)] = torch.from_numpy(document)
    output = model(tokens, attention_mask=(labels != IGNORE).long(), labels=labels, **extra)
    return output.loss, sum(len(document) - 1 for document in every)


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name, tmp_path):
    theirs = huggingface.build(name, tmp_path / "weights", fields=MODELS[name])
    config, params = load_checkpoint(tmp_path / "weights")
    params = stack_layers(params, config)
    micro_batches = documents(config.vocab_size)
    batch = packed(micro_batches)
    extra = {"output_router_logits": True} if config.is_moe else {}

    def check(batch, parts, how):
        losses = [of_transformers(theirs.model, rows, extra) for rows in parts]
        total = sum(count for _, count in losses)
        expected = sum(loss * count / total for loss, count in losses)
        theirs.model.zero_grad()
        expected.backward()
        weights = {name: parameter.detach().clone() for name, parameter in theirs.model.named_parameters()}
        with torch.no_grad():
            for parameter in theirs.model.parameters():
                parameter.copy_(parameter.grad)
        theirs.model.save_pretrained(tmp_path / f"gradients {len(parts)}")
        theirs.model.load_state_dict(weights, strict=False)
        _, expected_gradients = load_checkpoint(tmp_path / f"gradients {len(parts)}")

        loss, sums, gradients = jax.jit(lambda params: loss_and_gradients(config, params, batch, how))(params)
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
        assert sums.targets == total == 55
        assert (loss != sums.cross_entropy) == config.is_moe
        jax.tree.map(
            lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()),
            gradients,
            stack_layers(expected_gradients, config),
        )

    how = Step(dtype=jnp.float32, chunk=15)
    check(batch, micro_batches, how._replace(accumulate=2))
    together = jax.tree.map(lambda x: x.reshape(4, LENGTH), batch)
    check(together, [[row for rows in micro_batches for row in rows]], how)


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match="0 or more, got -0.1"):
        Pretraining(z_loss=-0.1)
