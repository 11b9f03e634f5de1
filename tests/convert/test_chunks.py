"""Cutting arrays into chunks."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np

from convert.chunks import chunk_shape, chunks_of, is_chunk_shape


@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 200))
def test_chunks_are_runs_that_cover_the_array(shape, limit):
    shape = tuple(shape)
    cut = chunk_shape(shape, 2, limit)
    assert is_chunk_shape(shape, list(cut))
    assert math.prod(cut) * 2 <= max(limit, 2)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    position, keys = 0, set()
    for chunk in chunks_of(shape, cut):
        assert chunk.start == position
        np.testing.assert_array_equal(numbers[chunk.box].ravel(), np.arange(chunk.start, chunk.stop))
        assert numbers[chunk.box].shape == chunk.shape
        assert chunk.key == tuple(side.start // width for side, width in zip(chunk.box, cut, strict=True))
        position = chunk.stop
        keys.add(chunk.key)
    assert position == numbers.size
    assert len(keys) == math.prod(-(-side // width) for side, width in zip(shape, cut, strict=True))


def test_real_shapes():
    assert chunk_shape((64, 2560, 3584), 2) == (1, 2560, 3584)  # an expert of 57B-A14B: 18 MB
    assert chunk_shape((60, 1408, 2048), 2) == (5, 1408, 2048)
    assert chunk_shape((152064, 8192), 2)[1] == 8192
    assert chunk_shape((8192,), 4) == (8192,)


def test_shapes_that_are_not_chunks():
    assert all(is_chunk_shape((3, 5), right) for right in ([3, 5], [2, 5], [1, 5], [1, 2]))
    assert not any(
        is_chunk_shape((3, 5), wrong) for wrong in ([2, 2], [0, 5], [1, 6], [True, 5], [3.0, 5], [3], "35", None)
    )
