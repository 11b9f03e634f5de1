"""The reference against a loop in float64, and the chunked path against the reference in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import attention
from qwen2_jax.attention import Context, attend, chunked_attention, dense_attention


def inputs(batch=2, queries=9, keys=9, heads=4, kv_heads=2, width=8, seed=0):
    q, k, v, dout = jax.random.split(jax.random.key(seed), 4)
    return (
        jax.random.normal(q, (batch, queries, heads, width)),
        jax.random.normal(k, (batch, kv_heads, keys, width)),
        jax.random.normal(v, (batch, kv_heads, keys, width)),
        jax.random.normal(dout, (batch, queries, heads, width)),
    )


def context(start, query_segments, key_segments):
    return Context(*(jnp.asarray(part, jnp.int32) for part in (start, query_segments, key_segments)))


def by_loop(query, key, value, where):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[1]
    for b, t, n in np.ndindex(*query.shape[:3]):
        document = where.query_segments[b, t]
        seen = [
            s
            for s in range(key.shape[2])
            if s <= where.start + t and document != 0 and where.key_segments[b, s] == document
        ]
        if seen:
            scores = key[b, n // group, seen] @ query[b, t, n] / np.sqrt(query.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ value[b, n // group, seen] / weights.sum()
    return out


def self_context(segments):
    return context(0, segments, segments)


CONTEXTS = {
    "causal": self_context([[1] * 9] * 2),
    "packed": self_context([[1, 1, 1, 2, 2, 2, 2, 3, 3], [5, 4, 4, 4, 4, 4, 1, 1, 1]]),
    "padded left and right": self_context([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0]]),
    "all padding": self_context([[0] * 9, [1] * 9]),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_against_loop(monkeypatch, name, implementation):
    monkeypatch.setattr(attention, "CHUNK", 4)
    query, key, value, _ = inputs()
    out = attend(query, key, value, CONTEXTS[name], implementation)
    np.testing.assert_allclose(out, by_loop(query, key, value, CONTEXTS[name]), atol=1e-6)


@pytest.mark.parametrize("start", [0, 3, 11])
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_queries_that_start_later(monkeypatch, start, implementation):
    monkeypatch.setattr(attention, "CHUNK", 4)
    query, key, value, _ = inputs(queries=5, keys=17)
    where = context(start, np.ones((2, 5)), np.arange(17)[None] < [[start + 5], [start + 2]])
    out = attend(query, key, value, where, implementation)
    np.testing.assert_allclose(out, by_loop(query, key, value, where), atol=1e-6)


@pytest.mark.parametrize(
    ("length", "heads"), [(1, (4, 4)), (15, (6, 2)), (16, (4, 4)), (17, (7, 1)), (33, (6, 2)), (50, (6, 3))]
)
def test_chunked_equals_dense_in_value_and_gradient(monkeypatch, length, heads):
    monkeypatch.setattr(attention, "CHUNK", 16)
    query, key, value, dout = inputs(2, length, length, *heads, seed=length)
    segments = np.sort(np.random.default_rng(length).integers(0, 4, (2, length)), axis=1)
    where = context(0, segments, segments)

    @jax.jit
    def run(query, key, value, dout):
        results = []
        for implementation in (chunked_attention, dense_attention):
            out, pull = jax.vjp(lambda *qkv, attention=implementation: attention(*qkv, where), query, key, value)
            results.append((out, *pull(dout)))
        return results

    for ours, oracle in zip(*run(query, key, value, dout), strict=True):
        np.testing.assert_allclose(ours, oracle, atol=2e-5)


def test_memory_grows_with_length_not_its_square():
    def temporaries(length, gradient):
        query, key, value, dout = jax.eval_shape(lambda: inputs(1, length, length))
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def run(query, key, value, dout, segments):
            where = Context(jnp.zeros((), jnp.int32), segments, segments)
            out, pull = jax.vjp(lambda *qkv: chunked_attention(*qkv, where), query, key, value)
            return pull(dout) if gradient else out

        compiled = jax.jit(run).lower(query, key, value, dout, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for gradient in (False, True):
        assert temporaries(16384, gradient) <= 2.2 * temporaries(8192, gradient)


def test_future_blocks_are_not_computed(monkeypatch):
    """A NaN in the values of a later block would reach the result through 0 * NaN if that block were multiplied."""
    monkeypatch.setattr(attention, "CHUNK", 4)
    query, key, value, _ = inputs(queries=8, keys=8)
    where = context(0, np.ones((2, 8)), np.ones((2, 8)))
    out = chunked_attention(query, key, value.at[:, :, 4:].set(jnp.nan), where)
    assert np.isfinite(out[:, :4]).all()


def test_long_inputs_take_the_chunked_path():
    query, key, value, _ = jax.eval_shape(lambda: inputs(1, 2048, 2048))
    where = context(0, np.ones((1, 2048)), np.ones((1, 2048)))
    text = jax.jit(lambda *qkv: attend(*qkv, where)).lower(query, key, value).as_text()
    assert "2048x2048" not in text
    assert "512x512" in text


def test_unknown_implementation():
    query, key, value, _ = inputs()
    with pytest.raises(ValueError, match="attention must be one of dense, chunked, got 'flash'"):
        attend(query, key, value, CONTEXTS["causal"], "flash")
