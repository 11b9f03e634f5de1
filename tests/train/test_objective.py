"""A new objective is one file, its data and its loss: this one, of preferences, goes through the loop as it is."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import Qwen2
from tests.train.runs import RandomRows, curves, events


class Pairs(NamedTuple):
    """[2, T] int32, the better text first, and [2] float32."""

    tokens: np.ndarray
    reference: np.ndarray


class PreferenceRows(RandomRows):
    """The better text goes on as it began."""

    def __getitem__(self, index):
        good = super().__getitem__(index).tokens
        bad = np.random.default_rng([7, index]).permutation(good)
        return Pairs(np.stack([good, bad]), np.zeros(2, np.float32))


@dataclasses.dataclass(frozen=True)
class Preference:
    """DPO (arXiv 2305.18290), equation 7, in little."""

    beta: float = 0.1

    def weight(self, batch):
        return jnp.float32(len(batch.reference))

    def __call__(self, config, params, batch, how, weight):
        tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
        model = Qwen2(config, stacked=True, dtype=how.dtype, remat=how.remat, options=how.options)
        logits = model.apply({"params": params}, tokens).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        gains = chosen.sum(axis=(1, 2)).reshape(-1, 2) - batch.reference
        margins = self.beta * (gains[:, 0] - gains[:, 1])
        return -jax.nn.log_sigmoid(margins).sum() / weight, (margins > 0).sum(dtype=jnp.int32)

    def metrics(self, sums):
        return {"better": sums}


@pytest.fixture
def prefer(train_run):
    def run(out, *flags):
        rows = lambda number, phase: PreferenceRows(phase.seq, number)  # noqa: E731
        flags = ("--steps", 2, "--batch", 16, "--log-every", 1, *flags)
        return train_run(out, *flags, rows=rows, objective=Preference())

    return run


def test_an_objective_of_its_own(prefer, tmp_path):
    assert prefer(tmp_path / "run").batches == [(1, 0), (2, 1)]
    records = curves(tmp_path / "run")
    np.testing.assert_allclose(records[1]["loss"], np.log(2), rtol=0.05)
    assert 0 <= records[1]["better"] <= 16 and records[1]["gradient_norm"] > 0
    assert [event["step"] for event in events(tmp_path / "run", "checkpoint")] == [0, 2]


def test_in_parts_on_another_mesh(prefer, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prefer(whole)
    prefer(parts, "--accumulate", 4, "--mesh", "data=2,fsdp=2,context=2")
    for step, record in curves(whole).items():
        for name in ("loss", "better", "gradient_norm"):
            np.testing.assert_allclose(curves(parts)[step][name], record[name], rtol=1e-4)
