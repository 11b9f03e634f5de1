"""A trace holds the steps that were asked for, whatever way the run ends."""

import jax
import jax.numpy as jnp
import pytest

from train.report.profile import Profile


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(profile, calls, steps):
    for step in steps:
        profile.before(step)
        calls.append(step)
        profile.after(step)


@pytest.mark.parametrize(
    "steps, expected",
    [
        ([1, 2, 3, 4, 5], [1, "start", 2, 3, "stop", 4, 5]),
        ([3, 4], ["start", 3, "stop", 4]),  # went on in the middle
        ([4, 5], [4, 5]),
        ([1, 2], [1, "start", 2, "stop"]),  # ended in the middle
        ([2, 3, 4, 2, 3], ["start", 2, 3, "stop", 4, 2, 3]),  # went back: once is enough
    ],
)
def test_steps(steps, expected, calls, tmp_path):
    with Profile(tmp_path, 2, 3) as profile:
        run(profile, calls, steps)
    assert calls == expected


def test_an_error_within_a_step_ends_the_trace(calls, tmp_path):
    with pytest.raises(KeyError), Profile(tmp_path, 1, 3) as profile:
        profile.before(1)
        raise KeyError
    assert calls == ["start", "stop"]


@pytest.mark.parametrize("first, last", [(0, 3), (4, 3), (-1, -1)])
def test_steps_that_are_none(first, last, tmp_path):
    with pytest.raises(ValueError, match=f"got {first} to {last}"):
        Profile(tmp_path, first, last)


def test_a_trace_is_written(tmp_path):
    program = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((64, 64))
    with Profile(tmp_path / "profile", 1, 2) as profile:
        for step in (1, 2, 3):
            profile.before(step)
            result = program(x)
            profile.after(step, result)
        (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
