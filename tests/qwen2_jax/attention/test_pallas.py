"""The TPU kernels: interpreted, against the loop in float64 and the other paths; compiled, for chips not here."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.attention import Context, chunked, pallas, softmax
from qwen2_jax.attention.context import part_of, visible
from qwen2_jax.attention.flash import flash_attention
from qwen2_jax.attention.pallas_steps import steps, unpacked
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.model import default_positions
from qwen2_jax.rope import Rotation
from tests.qwen2_jax.attention.cases import assert_paths_agree, make, value_and_gradient
from tests.tpu import run_for_tpu

BLOCK = 4  # of float32; the constants count two-byte elements

ROWS = [
    [1] * 23,
    [1] * 9 + [2] * 13 + [3],
    [5] * 1 + [4] * 12 + [1] * 10,
    [0] * 5 + [1] * 18,
    [1] * 20 + [0] * 3,
    [0] * 23,
]
CHUNKS = {
    "plain": None,
    "borders within blocks": DualChunk(7, 2),
    "borders of blocks": DualChunk(10, 2, original_max_position_embeddings=5),
    "temperature of the prompt": DualChunk(6, 2, original_max_position_embeddings=5, temperature="prompt"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name in ("BLOCK_QUERIES", "BLOCK_KEYS"):
        monkeypatch.setattr(pallas, name, 2 * BLOCK)
    monkeypatch.setattr(chunked, "BLOCK", BLOCK)


@pytest.mark.parametrize(("chunks", "kv_heads"), list(zip(CHUNKS, [1, 3, 1, 3], strict=True)))
def test_against_loop_and_dense_path(chunks, kv_heads):
    case = make(ROWS, heads=3, kv_heads=kv_heads, dual_chunk=CHUNKS[chunks])
    out = assert_paths_agree(case, "pallas")
    np.testing.assert_allclose(out, case.expected(), atol=1e-5)
    assert not out[-1].any()


@pytest.mark.parametrize("seed", range(3))
def test_random_shapes(monkeypatch, seed):
    random = np.random.default_rng(seed)
    for name in ("BLOCK_QUERIES", "BLOCK_KEYS"):
        monkeypatch.setattr(pallas, name, int(random.choice([8, 16, 32])))
    kv_heads, groups, batch = random.integers(1, 4, 3)
    chunk = int(random.integers(4, 24))
    dual_chunk = None if seed == 0 else DualChunk(chunk, int(random.integers(0, (chunk - 1) // 2 + 1)))
    segments = np.sort(random.integers(0, 4, (batch, random.integers(1, 60))), axis=1)
    assert_paths_agree(make(segments, kv_heads * groups, kv_heads, 8, seed, dual_chunk), "pallas")


def grouped(x, kv_heads):
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


@functools.partial(jax.jit, static_argnums=0)
def forward(kernel, *arguments):
    return kernel.forward(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def backward(kernel, *arguments):
    return kernel.backward(*arguments)


def test_same_interface_as_chunked():
    """Queries that start later, keys in two shards: outputs, log-sum-exps and gradients of each."""
    case = make([[1] * 30, [0] * 3 + [1] * 10 + [2] * 17], dual_chunk=DualChunk(6, 2))
    whole, rotation, key = case.context(), case.rotations().query, case.rotated_key()
    query, dout = grouped(case.query, 2)[:, :, :, 11:], grouped(case.dout, 2)[:, :, :, 11:]
    rotation = jax.tree.map(lambda table: table[:, :, 11:], rotation)
    shards = []
    for start, stop in ((0, 15), (15, 30)):
        context = Context(
            *(jnp.int32(11), jnp.int32(start), whole.query_segments[:, 11:], whole.key_segments[:, start:stop]),
            *(whole.query_chunks[:, 11:], whole.key_chunks[:, start:stop]),
        )
        shards.append((query, key[:, :, start:stop], case.value[:, :, start:stop], rotation, context))
    parts = [forward(pallas.KERNEL, *shard) for shard in shards]
    expected = [forward(chunked.KERNEL, *shard) for shard in shards]
    for ours, theirs in zip(parts, expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    out, lse = softmax.merge(*parts)
    np.testing.assert_allclose(out.transpose(0, 3, 1, 2, 4).reshape(2, 19, 4, 8), case.expected()[:, 11:], atol=1e-5)
    for shard in shards:
        ours, theirs = (backward(kernel, *shard, out, lse, dout) for kernel in (pallas.KERNEL, chunked.KERNEL))
        for gradient, reference in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(gradient, reference, atol=2e-5)


def test_bfloat16_is_as_exact_as_chunked(monkeypatch):
    for name in ("BLOCK_QUERIES", "BLOCK_KEYS"):
        monkeypatch.setattr(pallas, name, 16)
    monkeypatch.setattr(chunked, "BLOCK", 16)
    case = make([[1] * 100], width=32, dual_chunk=DualChunk(40, 10), dtype=jnp.bfloat16)
    arguments = (case.query, case.rotated_key(), case.value, case.dout, case.rotations().query)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)

    @jax.jit
    def every(arguments, exact):
        results = [value_and_gradient(name, *arguments, case.context()) for name in ("pallas", "chunked")]
        return *results, value_and_gradient("dense", *exact, case.context())

    for ours, theirs, expected in zip(*every(arguments, exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        error, allowed = (np.square(x.astype(jnp.float32) - expected).mean() ** 0.5 for x in (ours, theirs))
        assert error <= 1.5 * allowed


def test_skipped_blocks_are_not_computed():
    """A NaN in a block that is multiplied would reach the results through 0 * NaN."""
    case = make([[1] * 8 + [2] * 4 + [3] * 8], dual_chunk=DualChunk(6, 2))
    first, second, early, late = slice(0, 8), slice(8, 12), slice(12, 16), slice(16, 20)
    key, value = case.rotated_key().at[:, :, first].set(jnp.nan), case.value.at[:, :, first].set(jnp.nan)
    query, dout = case.query.at[:, first].set(jnp.nan), case.dout.at[:, first].set(jnp.nan)
    value, dout = value.at[:, :, late].set(jnp.nan), dout.at[:, early].set(jnp.nan)
    every = jax.jit(functools.partial(value_and_gradient, "pallas"))
    out, dquery, dkey, dvalue = every(query, key, value, dout, case.rotations().query, case.context())
    assert np.isnan(out[:, first]).all() and np.isnan(out[:, late]).all()
    for other_documents in (out[:, second], dquery[:, second], dkey[:, :, second], dvalue[:, :, second]):
        assert np.isfinite(other_documents).all()
    assert np.isfinite(out[:, early]).all()  # whose values are NaN later
    assert np.isfinite(dvalue[:, :, late]).all()  # whose queries' gradients are NaN earlier


def listed(segments, rotations, chunk, by_keys=False, query_start=0, queries=None):
    """The steps of each row, unpacked to lists of ints, and the [B, T, S] of what is seen and by which rotation."""
    segments = jnp.asarray(segments, jnp.int32)
    length = segments.shape[1]
    chunks = default_positions(segments) // chunk
    now = slice(query_start, query_start + (length if queries is None else queries))
    context = Context(
        *(jnp.int32(query_start), jnp.int32(0), segments[:, now], segments, chunks[:, now], chunks),
    )
    plan = steps(context, rotations, BLOCK, BLOCK, by_keys)
    slots = jnp.arange(length, dtype=jnp.int32)
    seen = visible(slots[now], segments[:, now], slots, segments)
    rows = [list(zip(*(field.tolist() for field in unpacked(row)), strict=True)) for row in np.asarray(plan.words)]
    return rows, int(plan.longest), np.where(seen, part_of(chunks[:, now], chunks, rotations), -1)


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_steps(seed, by_keys):
    """Every pair of blocks with something to see is listed once, in order; `open` promises only what is so."""
    random = np.random.default_rng(seed)
    segments = np.sort(random.integers(0, 4, (3, 32)), axis=1)
    segments[0] = 1
    rotations, start = (1, 0) if seed % 3 == 0 else (3, 4 * int(random.integers(0, 3)))
    rows, longest, parts = listed(segments, rotations, int(random.integers(3, 20)), by_keys, start, 32 - start)
    lengths = []
    for row, part in zip(rows, parts, strict=True):
        blocks = part.reshape(len(part) // BLOCK, BLOCK, -1, BLOCK).transpose(0, 2, 1, 3)
        blocks = blocks.swapaxes(0, 1) if by_keys else blocks
        last = max(at for at, step in enumerate(row) if step[6])
        lengths.append(last + 1)
        alive, idle = row[: last + 1], row[last + 1 :]
        assert [step[:2] for step in alive] == sorted({step[:2] for step in alive})
        assert {step[0] for step in alive} == set(range(len(blocks)))
        for before, step, after in zip([None, *alive], alive, [*alive[1:], None], strict=False):
            assert step[5] == (before is None or before[0] != step[0])
            assert step[6] == (after is None or after[0] != step[0])
        assert all(step[:3] == alive[-1][:3] and step[2] == step[3] and not any(step[4:]) for step in idle)
        ranges = {step[:2]: (range(step[2], step[3]), step[4]) for step in alive}
        for pair in np.ndindex(*blocks.shape[:2]):
            needed = set(np.unique(blocks[pair])) - {-1}
            within, is_open = ranges.get(pair, (range(0), 0))
            assert needed <= set(within)
            assert not is_open or (len(within) == 1 and (blocks[pair] == within[0]).all())
    assert longest == max(lengths)


def test_work():
    """Chunks of whole blocks: the causal minimum, and all but the diagonal and nothing else without a mask."""
    for chunk in (32, 8, 4):
        (row,), longest, _ = listed([[1] * 32], 3, chunk)
        assert longest == 8 * 9 / 2
        assert [step[:2] for step in row[:longest] if not step[4]] == [(block, block) for block in range(8)]
        assert all(step[3] == step[2] + 1 for step in row[:longest])
    (row,), longest, _ = listed([[1] * 16 + [2] * 16], 1, 32)
    assert longest == 2 * 4 * 5 / 2


def test_too_long_for_one_device():
    shapes = ((1, 1, 1, 2**21, 8), (1, 1, 2**21, 8), (1, 1, 2**21, 4), (1, 2**21))
    query, key, table = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes[:3])
    row, start = jax.ShapeDtypeStruct(shapes[3], jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(ValueError, match="at most 196608 pairs"):
        jax.eval_shape(pallas.KERNEL.forward, query, key, key, Rotation(table, table), Context(start, start, row, row))


def compile_for_tpu(topology: str, width: int, rotations: int, length: int) -> dict:
    """Facts about the gradient as compiled for one chip of a topology. Runs in a process of its own."""
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array([chip]), "x"), jax.sharding.PartitionSpec())
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

    def gradient(query, key, value, dout, rotation, context):
        out, pull = jax.vjp(lambda *qkv: flash_attention(pallas.KERNEL, *qkv, rotation, context), query, key, value)
        return out, pull(dout)

    query = struct((1, 2, 3, length, width), jnp.bfloat16)
    key = struct((1, 2, length, width), jnp.bfloat16)
    table = struct((rotations, 1, length, width // 2), jnp.bfloat16)
    start, row = struct((), jnp.int32), struct((1, length), jnp.int32)
    chunks = (row, row) if rotations > 1 else (None, None)
    context = Context(start, start, row, row, *chunks)
    traced = jax.jit(gradient).trace(query, key, key, query, Rotation(table, table), context)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "square": f"{length},{length}]" in text,
        "temporaries": memory.temp_size_in_bytes,
    }


@pytest.mark.tpu
@pytest.mark.parametrize(("width", "rotations"), [(64, 1), (128, 3)])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_compiles_for_tpu(topology, width, rotations):
    code = (
        "import json; from tests.qwen2_jax.attention.test_pallas import compile_for_tpu; "
        f"print(json.dumps(compile_for_tpu({topology!r}, {width}, {rotations}, 4096)))"
    )
    run = run_for_tpu("-c", code)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kernels"] == 3
    assert not found["square"]
    assert found["temporaries"] < 4096 * 4096 * 4  # one head's scores
