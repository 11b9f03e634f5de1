"""The dense reference against a loop in float64, and the gradient rules of both paths against the reference's."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.attention import Context, attend, chunked, dense, softmax
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.rope import Rotation
from tests.qwen2_jax.attention.cases import assert_paths_agree, make, value_and_gradient

DOCUMENTS = {
    "causal": [[1] * 23] * 2,
    "packed": [[1] * 9 + [2] * 13 + [3], [5] * 1 + [4] * 12 + [1] * 10],
    "padded left and right": [[0] * 5 + [1] * 18, [1] * 20 + [0] * 3],
    "all padding": [[0] * 23, [1] * 23],
}
CHUNKS = {
    "plain": None,
    "dual chunk": DualChunk(6, 2),
    "odd sizes": DualChunk(7, 2),
    "no local window": DualChunk(5, 0),
    "temperature": DualChunk(6, 2, original_max_position_embeddings=5),
    "temperature of the prompt": DualChunk(6, 2, original_max_position_embeddings=5, temperature="prompt"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 4)
    monkeypatch.setattr(dense, "_LEAST", 4)


def run(case, implementation):
    return attend(case.query, case.rotated_key(), case.value, case.rotations().query, case.context(), implementation)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_against_loop(implementation, documents, chunks):
    case = make(DOCUMENTS[documents], dual_chunk=CHUNKS[chunks])
    np.testing.assert_allclose(run(case, implementation), case.expected(), atol=1e-5)


# s = 8 tokens to a chunk, C = 11: every border of a chunk, of the clamp and of the blocks of 4.
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize(
    "length", [1, 8, 11, 12, 17, 33, *(pytest.param(length, marks=pytest.mark.slow) for length in (7, 9, 13, 16, 25))]
)
def test_gradient_at_every_border(length, implementation):
    case = make([[1] * length], heads=3, kv_heads=1, seed=length, dual_chunk=DualChunk(11, 3, 9))
    assert_paths_agree(case, implementation)
    np.testing.assert_allclose(run(case, implementation), case.expected(), atol=1e-5)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 12))])
def test_gradient_of_random_shapes(monkeypatch, seed, implementation):
    random = np.random.default_rng(seed)
    monkeypatch.setattr(chunked, "BLOCK", int(random.choice([4, 8, 16])))
    kv_heads, groups, batch = random.integers(1, 4, 3)
    chunk = int(random.integers(4, 24))
    dual_chunk = None if seed % 4 == 0 else DualChunk(chunk, int(random.integers(0, (chunk - 1) // 2 + 1)))
    segments = np.sort(random.integers(0, 4, (batch, random.integers(1, 60))), axis=1)
    assert_paths_agree(make(segments, kv_heads * groups, kv_heads, 8, seed, dual_chunk), implementation)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize("chunks", ["plain", "odd sizes", "temperature"])
def test_gradient_against_loop(implementation, chunks):
    """Along one random direction of each input, by differences of the loop in float64."""
    case = make([[1] * 9 + [2] * 24], dual_chunk=CHUNKS[chunks])

    def output(query, key, value):
        return attend(query, case.rotated_key(key), value, case.rotations().query, case.context(), implementation)

    inputs = {"query": case.query, "key": case.key, "value": case.value}
    gradients = jax.vjp(output, *inputs.values())[1](case.dout)
    for seed, (name, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction = np.random.default_rng(seed).normal(size=gradient.shape)
        ahead, behind = (
            dataclasses.replace(case, **{name: np.asarray(inputs[name], np.float64) + step * direction}).expected()
            for step in (1e-5, -1e-5)
        )
        slope = ((ahead - behind) * np.asarray(case.dout)).sum() / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs((gradient * direction).sum() - slope) <= 1e-5 * scale


def test_the_longest_input_that_dual_chunk_leaves_alone():
    """Up to C + 1 tokens every distance is the true one; with one more the last row changes."""
    dual_chunk = DualChunk(9, 3)
    for length, same in ((10, True), (11, False)):
        case = make([[1] * length], dual_chunk=dual_chunk)
        plain = make([[1] * length])
        assert np.allclose(run(case, "chunked"), run(plain, "chunked"), atol=1e-5) == same


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize("start", [0, 3, 11])
def test_queries_that_start_later(implementation, start):
    case = make([[1] * 17, [0] * 2 + [1] * 15], dual_chunk=DualChunk(6, 2))
    whole, rotation = case.context(), case.rotations().query
    stop = start + 5
    context = Context(
        jnp.int32(start),
        whole.key_start,
        whole.query_segments[:, start:stop],
        jnp.where(jnp.arange(17)[None] < stop, whole.key_segments, 0),
        whole.query_chunks[:, start:stop],
        whole.key_chunks,
    )
    rotation = jax.tree.map(lambda table: table[:, :, start:stop], rotation)
    out = attend(case.query[:, start:stop], case.rotated_key(), case.value, rotation, context, implementation)
    np.testing.assert_allclose(out, case.expected()[:, start:stop], atol=1e-5)


def test_keys_may_come_in_shards():
    """What context parallelism will do: attend to each shard, merge, and give the whole's log-sum-exp to the shards."""
    case = make([[1] * 8 + [2] * 22], dual_chunk=DualChunk(6, 2))
    whole, rotation, key = case.context(), case.rotations().query, case.rotated_key()
    query = case.query.reshape(1, 30, 2, 2, 8).transpose(0, 2, 3, 1, 4)
    dout = case.dout.reshape(1, 30, 2, 2, 8).transpose(0, 2, 3, 1, 4)

    def shard(start, stop):
        context = Context(
            whole.query_start,
            jnp.int32(start),
            whole.query_segments,
            whole.key_segments[:, start:stop],
            whole.query_chunks,
            whole.key_chunks[:, start:stop],
        )
        return query, key[:, :, start:stop], case.value[:, :, start:stop], rotation, context

    shards = [shard(0, 13), shard(13, 20), shard(20, 30)]
    out, lse = chunked.KERNEL.forward(query, key, case.value, rotation, whole)
    parts = [chunked.KERNEL.forward(*part) for part in shards]
    merged = softmax.merge(softmax.merge(parts[0], parts[1]), parts[2])
    np.testing.assert_allclose(merged[0], out, atol=1e-5)
    np.testing.assert_allclose(merged[1], lse, atol=1e-5)

    gradients = chunked.KERNEL.backward(query, key, case.value, rotation, whole, out, lse, dout)
    dquery, dkey, dvalue = zip(*(chunked.KERNEL.backward(*part, out, lse, dout) for part in shards), strict=True)
    np.testing.assert_allclose(sum(dquery), gradients[0], atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(dkey, axis=2), gradients[1], atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(dvalue, axis=2), gradients[2], atol=1e-5)


@pytest.mark.parametrize("dual_chunk", [None, DualChunk(2048, 64)])
def test_memory_grows_with_length_not_its_square(monkeypatch, dual_chunk):
    monkeypatch.setattr(chunked, "BLOCK", 512)

    def temporaries(length, gradient):
        query, key = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, length, 4, 8), (1, 2, length, 8)))
        tables = jax.ShapeDtypeStruct((1 if dual_chunk is None else 3, 1, length, 4), jnp.float32)
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def run(query, key, value, dout, table, row):
            zero = jnp.zeros((), jnp.int32)
            context = Context(zero, zero, row, row, *([] if dual_chunk is None else [row, row]))
            results = value_and_gradient("chunked", query, key, value, dout, Rotation(table, table), context)
            return results[1:] if gradient else results[0]

        compiled = jax.jit(run).lower(query, key, key, query, tables, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for gradient in (False, True):
        sizes = [temporaries(length, gradient) for length in (8192, 16384, 32768, 65536)]
        assert all(double <= 2.2 * single for single, double in itertools.pairwise(sizes)), sizes


def test_future_blocks_are_not_computed():
    """A NaN in the values of a later block would reach the result through 0 * NaN if that block were multiplied."""
    case = make([[1] * 8])
    case.value = case.value.at[:, :, 4:].set(jnp.nan)
    assert np.isfinite(run(case, "chunked")[:, :4]).all()


def test_other_documents_are_not_computed():
    case = make([[1] * 8 + [2] * 8])
    case.value = case.value.at[:, :, :8].set(jnp.nan)
    assert np.isfinite(run(case, "chunked")[:, 8:]).all()


@pytest.mark.parametrize("dual_chunk", [None, DualChunk(12, 4), DualChunk(8, 2), DualChunk(23, 10)])
def test_work(dual_chunk):
    """Blocks of 4: each pair of blocks is computed once for every rotation that some query and key in it need."""
    case = make([[1] * 64], dual_chunk=dual_chunk)
    length = 64 if dual_chunk is None else dual_chunk.chunk_length
    needed = {(i // 4, j // 4, min(i // length - j // length, 2)) for i in range(64) for j in range(i + 1)}
    assert chunked.steps(case.context(), 1 if dual_chunk is None else 3) == len(needed)
    if length % 4 == 0:
        assert len(needed) == 16 * 17 / 2  # the causal minimum: no block is met twice


def test_rows_need_no_more_than_one_of_them_does():
    """Rows whose documents begin elsewhere do not make each other meet blocks by rotations that none of them needs."""
    rows = [[1] * 64, [1] * 32 + [2] * 32, [1] * 20 + [2] * 12 + [3] * 32]
    dual_chunk = DualChunk(12, 4)
    counts = [chunked.steps(make([row], dual_chunk=dual_chunk).context(), 3) for row in rows]
    together = chunked.steps(make(rows, dual_chunk=dual_chunk).context(), 3)
    assert max(counts) <= together <= sum(counts)
    assert chunked.steps(make([rows[1]] * 3, dual_chunk=dual_chunk).context(), 3) == counts[1]


def test_long_inputs_take_the_chunked_path(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 512)
    case = make([[1] * 2048])
    text = jax.jit(lambda query: attend(query, case.rotated_key(), case.value, case.rotations().query, case.context()))
    text = text.lower(case.query).as_text()
    assert "2048x2048" not in text
    assert "512x512" in text


def test_unknown_implementation():
    with pytest.raises(ValueError, match="attention must be one of .*, got 'flush'"):
        run(make([[1] * 3]), "flush")


@pytest.mark.parametrize("dual_chunk", [None, DualChunk(11, 3, 9)])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_bfloat16(implementation, length, dual_chunk):
    """XLA:CPU has no kernel for some products in bfloat16, which only running one finds out."""
    case = make([[1] * length] * 2, dual_chunk=dual_chunk, dtype=jnp.bfloat16)
    arguments = case.query, case.rotated_key(), case.value, case.dout
    exact = [x.astype(jnp.float32) for x in arguments]
    rotation, context = case.rotations().query, case.context()
    turns = jax.tree.map(lambda table: table.astype(jnp.float32), rotation)
    ours = jax.jit(lambda *inputs: value_and_gradient(implementation, *inputs, rotation, context))(*arguments)
    theirs = jax.jit(lambda *inputs: value_and_gradient(dense_attention, *inputs, turns, context))(*exact)
    for x, expected in zip(ours, theirs, strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.abs(x.astype(jnp.float32) - expected).max() <= 0.02 * max(np.abs(expected).max(), 1)
