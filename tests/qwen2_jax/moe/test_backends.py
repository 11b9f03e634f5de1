"""Every backend against the loop over experts, in value and in every gradient; and the work that each does not do."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.moe import BACKENDS, Experts, backend_name, check_moe, default_backend, keep, moe, route
from qwen2_jax.moe.rows import group
from tests.qwen2_jax.moe.cases import LOGITS, make_experts
from tests.tpu import run_for_tpu

FAST = [name for name in BACKENDS if name != "loop"]


def assert_close(ours, theirs, tolerance):
    """Within `tolerance` of the largest number of each array."""

    def check(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))

    jax.tree.map(check, ours, theirs)


@functools.partial(jax.jit, static_argnames=("backend", "choices"))
def run_tokens(x, logits, experts, real, backend, choices):
    """The result, and the gradients of tokens, logits and experts."""

    def forward(x, logits, experts):
        return moe(x, keep(route(logits, choices, False), real[..., None]), experts, backend)

    y, pull = jax.vjp(forward, x, logits, experts)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(
    ("shape", "count", "choices"), [((1,), 6, 3), ((13,), 5, 1), ((5, 8), 7, 4), ((300,), 3, 3), ((2, 33), 3, 2)]
)
def test_tokens(kind, shape, count, choices):
    logits = LOGITS[kind](shape, count, choices, jax.random.key(2))
    x, experts = jax.random.normal(jax.random.key(1), (*shape, 8)), make_experts(count)
    real = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape) % 5 != 2
    oracle = run_tokens(x, logits, experts, real, "loop", choices)
    assert not np.asarray(oracle[0])[~np.asarray(real)].any()
    for backend in FAST:
        assert_close(run_tokens(x, logits, experts, real, backend, choices), oracle, 1e-5)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_bfloat16_tokens(weights):
    x = jax.random.normal(jax.random.key(1), (40, 16), jnp.bfloat16)
    logits = jax.random.normal(jax.random.key(2), (40, 6), jnp.bfloat16)
    experts, real = make_experts(6, 16, 12, dtype=weights), jnp.ones(40, bool)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, logits, experts))
    exact = run_tokens(*exact, real, "loop", 3)
    for backend in BACKENDS:
        ours = run_tokens(x, logits, experts, real, backend, 3)
        assert ours[0].dtype == ours[1][0].dtype == jnp.bfloat16
        assert all(leaf.dtype == weights for leaf in jax.tree.leaves(ours[1][2]))
        assert_close(jax.tree.map(lambda a: a.astype(jnp.float32), ours), exact, 2e-2)


@functools.partial(jax.jit, static_argnames="backend")
def run_rows(rows, expert_of_row, experts, dout, backend):
    y, pull = jax.vjp(lambda rows, experts: BACKENDS[backend](rows, expert_of_row, experts), rows, experts)
    return y, pull(dout)


@pytest.mark.parametrize(
    "expert_of_row",
    [[4, 0, 2, 4, 2, 1, 4, 4, 2, 0, 4], [4] * 7, [3] * 20, [0, 4] * 9, [1], [4]],
    ids=["mixed", "nobody", "one expert", "half nobody", "one row", "one row of nobody"],
)
def test_rows_of_nobody(expert_of_row):
    """They give zero, whatever stands in them and in their gradient."""
    experts = make_experts(4)
    nobody = np.asarray(expert_of_row) == 4
    rows = jax.random.normal(jax.random.key(1), (nobody.size, 8))
    dout = jax.random.normal(jax.random.key(2), rows.shape)
    rows, dout = (jnp.where(nobody[:, None], 1e6, side) for side in (rows, dout))
    oracle = run_rows(rows, jnp.asarray(expert_of_row, jnp.int32), experts, dout, "loop")
    for backend in FAST:
        y, (drows, dexperts) = run_rows(rows, jnp.asarray(expert_of_row, jnp.int32), experts, dout, backend)
        assert not np.asarray(y)[nobody].any() and not np.asarray(drows)[nobody].any()
        assert_close((y, (drows, dexperts)), oracle, 1e-5)


def test_group():
    expert_of_row = np.random.default_rng(0).integers(0, 6, 50)
    groups = group(jnp.asarray(expert_of_row, jnp.int32), 5)
    np.testing.assert_array_equal(groups.order, np.argsort(expert_of_row, stable=True))
    np.testing.assert_array_equal(groups.place, np.argsort(np.argsort(expert_of_row, stable=True)))
    np.testing.assert_array_equal(groups.sizes, np.bincount(expert_of_row, minlength=6)[:5])


def compiled(backend, tokens, count, choices, width, inner):
    def run(x, logits, experts):
        return jax.grad(lambda x, e: moe(x, route(logits, choices, False), e, backend).sum(), (0, 1))(x, experts)

    experts = jax.eval_shape(lambda: make_experts(count, width, inner))
    return jax.jit(run).lower(jnp.zeros((tokens, width)), jnp.zeros((tokens, count)), experts).compile()


def test_no_buffer_of_tokens_times_experts_times_width():
    tokens, count, choices, width = 256, 32, 4, 24
    text = compiled("sorted", tokens, count, choices, width, 5).as_text()
    largest = max(math.prod(int(side) for side in shape.split(",")) for shape in re.findall(r"f32\[([\d,]+)\]", text))
    assert largest < tokens * count * width / 3


def test_wide_rows_are_not_scattered():
    """Gradients of gathers are gathers. What XLA:CPU makes of them is its own affair."""

    def scatters_of_rows(gather):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: gather(x).sum()))(jnp.zeros((16, 8)))
        return re.findall(r"f32\[\d+,8\] = scatter", str(jaxpr))

    routing, experts = route(jax.random.normal(jax.random.key(0), (16, 4)), 2, False), make_experts(4)
    assert scatters_of_rows(lambda x: x[routing.experts[:, 0]])
    assert not scatters_of_rows(lambda x: moe(x, routing, experts, "ragged"))
    assert not scatters_of_rows(lambda x: BACKENDS["ragged"](x, routing.experts[:, 0], experts))


@pytest.mark.tpu
def test_ragged_on_tpu_does_the_work_once():
    done = run_for_tpu(str(Path(__file__).parent / "compile_ragged.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["flops"] < 1.05 * report["products"]
    assert report["largest"] <= report["largest_expected"]


def test_names():
    assert (default_backend("cpu"), default_backend("gpu"), default_backend("tpu")) == ("sorted", "sorted", "ragged")
    assert backend_name(None, "tpu") == "ragged"
    assert backend_name("loop", "tpu") == "loop"

    class Exchange:
        name = "exchange, sorted"

        def __call__(self, *arguments): ...

    assert backend_name(Exchange(), "tpu") == "exchange, sorted"
    assert isinstance(make_experts(1), Experts)
    for accepted in (None, "ragged", Exchange()):
        check_moe(accepted, 1.25)
    with pytest.raises(ValueError, match="one of loop, sorted, ragged, got 'fast'"):
        check_moe("fast", None)
    with pytest.raises(ValueError, match="positive, or None to drop nothing, got 0"):
        check_moe(None, 0)
