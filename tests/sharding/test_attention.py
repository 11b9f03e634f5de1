"""Attention split over rows and heads equals attention on one device, in value and gradient."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwen2_jax.attention import attend
from qwen2_jax.dual_chunk import DualChunk
from sharding.attention import SplitAttention, _owner
from tests.qwen2_jax.attention.cases import make


def mesh_of(**axes):
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


@pytest.mark.parametrize(
    ("implementation", "rows", "axes"),
    [
        ("chunked", 1, {"data": 2, "fsdp": 2, "tensor": 2}),
        ("chunked", 2, {"data": 2, "fsdp": 2, "tensor": 2}),
        ("dense", 4, {"data": 2, "fsdp": 2, "tensor": 2}),
        ("pallas", 4, {"data": 2, "fsdp": 2, "tensor": 2}),  # interpreted
        (None, 2, {"context": 2, "tensor": 2}),
        ("chunked", 3, {"context": 4}),
        ("pallas", 2, {"context": 2, "tensor": 2}),
        ("dense", 2, {"context": 8}),  # 36 tokens do not divide by 16: not split
        ("dense", 1, {"context": 3}),  # an odd number of devices deals its pieces the other way
    ],
)
def test_equals_one_device(rows, implementation, axes):
    segments = [[1] * 20 + [2] * 16, [0] * 3 + [1] * 33, [1] * 36, [1] * 34 + [0] * 2][:rows]
    case = make(segments, dual_chunk=DualChunk(9, 2))
    split = SplitAttention(mesh_of(**axes), implementation)
    arguments = case.query, case.rotated_key(), case.value, case.rotations().query, case.context()

    @jax.jit
    def run(query, key, value, rotation, context):
        results = []
        for how in (split, implementation):
            out, pull = jax.vjp(lambda *qkv, how=how: attend(*qkv, rotation, context, how), query, key, value)
            results.append((out, *pull(case.dout)))
        return results

    for ours, alone in zip(*run(*arguments), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_devices_of_context_have_equal_work():
    """Each of c devices meets the same number of blocks, instead of 1, 3, ..., 2c - 1 parts of them."""
    devices, piece = 4, 8
    case = make([[1] * (2 * devices * piece)])
    work = []
    for device in range(devices):
        pieces = [i for i in range(2 * devices) if _owner(i, devices) == device]
        assert len(pieces) == 2
        work.append(sum(i + 1 for i in pieces))
    assert len(set(work)) == 1

    mesh = mesh_of(context=devices)
    by_length = NamedSharding(mesh, PartitionSpec(None, "context"))
    by_slot = NamedSharding(mesh, PartitionSpec(None, None, "context"))
    query = jax.device_put(case.query, by_length)
    key, value = (jax.device_put(x, by_slot) for x in (case.rotated_key(), case.value))
    run = jax.jit(lambda *qkv: attend(*qkv, case.rotations().query, case.context(), SplitAttention(mesh, "dense")))
    text = run.lower(query, key, value).compile().as_text()
    assert len(re.findall(r" all-gather(-start)?\(", text)) == 2  # keys and values; the queries only change places
    heads, width = query.shape[2:]
    assert not re.search(
        rf"f32\[[\d,]*{2 * devices * piece},{heads},{width}\]", text.partition("ENTRY")[2].replace("{", "")
    )


def test_rows_are_split_over_the_axes_that_divide_them():
    case = make([[1] * 8] * 2)
    mesh = mesh_of(data=2, fsdp=4)
    split = SplitAttention(mesh, "dense")
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    arguments = [jax.device_put(x, by_row) for x in (case.query, case.rotated_key(), case.value)]
    run = jax.jit(lambda *qkv: attend(*qkv, case.rotations().query, case.context(), split))
    compiled = run.lower(*arguments).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled.output_shardings.spec == PartitionSpec("data")


def test_refuses():
    case = make([[1] * 8])
    mesh = mesh_of(tensor=4)
    with pytest.raises(ValueError, match="2 key/value heads do not divide over 4 devices of tensor"):
        attend(
            *(case.query, case.rotated_key(), case.value, case.rotations().query, case.context()),
            SplitAttention(mesh, "dense"),
        )
    with pytest.raises(ValueError, match="attention must be one of"):
        SplitAttention(mesh, "flash")


def test_rows_on_several_devices_agree_once():
    """The compiler splits "chunked" by rows itself; devices agree which blocks to meet, and only ahead of the loops."""
    case = make([[1] * 20 + [2] * 13] * 4, dual_chunk=DualChunk(9, 2))
    mesh = mesh_of(data=4)
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    query, key, value, segments = (
        jax.device_put(x, by_row) for x in (case.query, case.rotated_key(), case.value, case.context().query_segments)
    )
    chunks = jax.device_put(case.context().query_chunks, by_row)
    context = case.context().replace(
        query_segments=segments, key_segments=segments, query_chunks=chunks, key_chunks=chunks
    )
    rotation = jax.device_put(case.rotations().query, NamedSharding(mesh, PartitionSpec(None, "data")))
    run = jax.jit(lambda *qkv: attend(*qkv, "chunked"))
    text = run.lower(query, key, value, rotation, context).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce(" not in text.partition("ENTRY ")[0]
    np.testing.assert_allclose(run(query, key, value, rotation, context), case.expected(), atol=1e-5)
