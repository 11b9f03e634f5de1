"""Every preset is a run that fits, by the planner's formula, on the slice in its name."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from qwen2_jax.sizes import published
from sharding.mesh import MeshSpec
from sharding.planner.chips import parse_topology
from sharding.planner.estimate import estimate
from sharding.planner.request import Request, checked
from train.run_file import presets, read_run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", presets())
def test_fits(name):
    model, chip, shape = re.fullmatch(r"(.+)-(v\d\w)-([\dx]+)", name).groups()
    run, place = read_run([name]), parse_topology(f"{chip}:{shape}")
    # That of 57B-A14B begins with what `convert upcycle` makes of 7B, whose config is that of the published model.
    assert run.start.model == model or (run.start.init and "a14b" in model)
    config, spec = published(model), MeshSpec.parse(run.compute.mesh)
    assert len(run.stretches) == 2
    for phase in run.stretches:
        rows, left = divmod(phase.batch, phase.accumulate)
        assert left == 0
        request = Request(name, config, place, spec, "train", rows, phase.seq, run.compute.remat)
        plan = estimate(checked(dataclasses.replace(request, accumulates=phase.accumulate > 1)))
        assert plan.fits, f"{phase.seq}: {plan.memory.total / 1e9:.1f} GB"
    first, last = run.stretches
    assert (first.seq, last.seq) == (4096, 32768)
    if run.start.model:
        assert (first.rope_theta, last.rope_theta) == (10_000, 1_000_000)
    assert run.warm_up + (run.optimization.decay or 0) <= run.steps


def test_the_documentation_lists_them():
    table = re.findall(r"^\| (qwen2-\S+) \| (\d+) (\w+) \| (\S+) \|$", (ROOT / "docs/training.md").read_text(), re.M)
    assert sorted(name for name, *_ in table) == presets()
    for name, count, chip, mesh in table:
        assert read_run([name]).compute.mesh == mesh
        assert parse_topology(f"{chip}:{name.rpartition('-')[2]}").devices == int(count)


def test_are_installed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["train"]
    files = {path.stem for pattern in data for path in (ROOT / "train").glob(pattern)}
    assert files >= set(presets())
