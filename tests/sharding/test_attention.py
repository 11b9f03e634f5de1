"""Attention split over rows and heads equals attention on one device, in value and gradient."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwen2_jax.attention import attend
from qwen2_jax.dual_chunk import DualChunk
from sharding.attention import attention_over_heads
from tests.qwen2_jax.attention.cases import make


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize(
    ("implementation", "rows"),
    [("chunked", 1), ("chunked", 2), ("dense", 4), ("pallas", 4)],  # pallas is interpreted
)
def test_equals_one_device(rows, implementation):
    segments = [[1] * 20 + [2] * 13, [0] * 3 + [1] * 30, [1] * 33, [1] * 31 + [0] * 2][:rows]
    case = make(segments, dual_chunk=DualChunk(9, 2))
    split = attention_over_heads(mesh_of(data=2, fsdp=2, tensor=2), implementation)
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


def test_rows_are_split_over_the_axes_that_divide_them():
    case = make([[1] * 8] * 2)
    mesh = mesh_of(data=2, fsdp=4)
    split = attention_over_heads(mesh, "dense")
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
            attention_over_heads(mesh, "dense"),
        )
    with pytest.raises(ValueError, match="attention must be one of"):
        attention_over_heads(mesh, "flash")


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
