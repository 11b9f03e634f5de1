"""The loss on held-out rows is the mean over all of their targets, and looking at it changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import Qwen2
from sharding import make_mesh, run_options
from tests.sharding.models import DENSE, MOE, parameters
from tests.train.runs import RandomRows, curves, digests, events
from train import next_token_loss
from train.data.batches import Batches
from train.objective import Step
from train.pretraining import Pretraining
from train.run import Phase
from train.text import validation_rows_of_text
from train.validation import Validation

ROWS, SEQ = 4, 16


class UnevenRows(RandomRows):
    """Rows differ in how many of their targets count."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        tokens, targets = row.tokens % 60, np.where(row.targets < 0, row.targets, row.targets % 60)
        return row._replace(tokens=tokens, targets=np.where(np.arange(self._seq) < index, -100, targets))


@pytest.mark.parametrize("config, mesh", [(DENSE, None), (MOE, None), (DENSE, "data=2,context=2,tensor=2")])
def test_mean_over_all_targets(config, mesh):
    mesh = mesh and make_mesh(mesh)
    how = Step(dtype=jnp.float32, mesh=mesh, options=run_options(config, mesh)) if mesh else Step(dtype=jnp.float32)
    params = parameters(config)
    found = Validation(config, Pretraining(z_loss=0.01), how, Batches(UnevenRows(SEQ), (ROWS,), mesh), 3)(params)

    # The load-balancing loss of a batch is one of its own; the others are of all rows at once.
    batches = [Batches(UnevenRows(SEQ), (ROWS,)).at(index) for index in range(3)]
    counts = [int((batch.targets >= 0).sum()) for batch in batches]
    assert len(set(counts)) == 3, "or any mean would do"

    @jax.jit
    def of(batch):
        output = Qwen2(config).apply({"params": params}, batch.tokens, segment_ids=batch.segment_ids)
        return next_token_loss(config, output, batch.targets, 0.01)

    losses = [of(batch) for batch in batches]
    assert found["targets"] == sum(counts)
    for name, values in (
        ("loss", [one.total for one in losses]),
        ("cross_entropy", [one.cross_entropy for one in losses]),
    ):
        np.testing.assert_allclose(found[name], np.average(values, weights=counts), rtol=1e-5)
    assert ("moe/router_entropy" in found) == config.is_moe


def test_a_run_that_looks(train_run, tmp_path):
    """It trains as one that does not, and says the same of steps that it takes twice."""
    plain, looking, again = (tmp_path / name for name in ("plain", "looking", "again"))
    options = "--validate-every", 3, "--validation-rows", 9
    train_run(plain)
    train_run(looking, *options, validation=lambda phase: RandomRows(phase.seq, 7))
    records = curves(looking)
    assert digests(looking, 12) == digests(plain, 12)
    assert sorted(records) == [2, 3, 4, 6, 8, 9, 10, 12]
    looked = {step: record for step, record in records.items() if "validation_loss" in record}
    assert sorted(looked) == [3, 6, 9, 12]
    # Two batches of 8 rows hold the 9 that were asked for.
    assert {record["validation_targets"] for record in looked.values()} == {2 * 8 * 14}
    assert looked[12]["validation_loss"] != looked[3]["validation_loss"] == looked[3]["validation_cross_entropy"]
    assert all(record["loss"] == records[step]["loss"] for step, record in curves(plain).items())

    for resume in ("auto", 8):
        train_run(again, "--resume", resume, *options, validation=lambda phase: RandomRows(phase.seq, 7))
    assert [event["step"] for event in events(again, "start")] == [0, 8] and curves(again) == records


def test_every_phase_has_its_own(train_run, tmp_path):
    """Rows of its length, without its micro-batches."""
    run = train_run.run(tmp_path / "run", "--validation-rows", 8)
    run = dataclasses.replace(run, phases=(Phase(2), Phase(2, seq=32, batch=16, accumulate=2)))
    train_run(run.out, run=run, validation=lambda phase: RandomRows(phase.seq, 7))
    assert {step: record.get("validation_targets") for step, record in curves(run.out).items()} == {
        2: 8 * 14,
        4: 8 * 30,
    }


def test_text(train_run, tmp_path):
    """The same rows whatever the seed; none if there is no such text."""
    (tmp_path / "held.txt").write_text("".join(f"{number} " for number in range(500)))
    runs = [train_run.run(tmp_path / "run", "--validation-data", tmp_path / "held.txt", "--seed", n) for n in (0, 1)]
    one, other = (validation_rows_of_text(run)(run.stretches[0]) for run in runs)
    assert all(np.array_equal(one[index].tokens, other[index].tokens) for index in range(8))
    assert not np.array_equal(one[0].tokens, one[1].tokens)
    assert validation_rows_of_text(train_run.run(tmp_path / "run")) is None
