"""Positions of Dual Chunk Attention against the published worked examples and the closed form."""

import numpy as np
import pytest

from qwen2_jax.dual_chunk import DualChunk
from tests.oracles.attention import relative_positions


def matrix(dual_chunk, length):
    """[T, S] distances from the rotations that queries and keys get; -1 in the future."""
    positions = np.arange(length)
    queries, keys = dual_chunk.query_positions(positions), dual_chunk.key_positions(positions)
    chunks = positions // dual_chunk.chunk_length
    parts = np.clip(chunks[:, None] - chunks[None], 0, 2)
    distances = np.choose(parts, np.stack(queries)[:, :, None] - keys[None, None])
    return np.where(positions[:, None] >= positions[None], distances, -1)


def rows(text):
    return [[int(number) for number in line.replace("|", " ").split()] for line in text.strip().splitlines()]


def test_worked_example():
    expected = rows(
        """
        0
        1 0
        2 1 0
        3 2 1 0
        4 3 2 1 | 0
        5 4 3 2 | 1 0
        6 5 4 3 | 2 1 0
        6 5 4 3 | 3 2 1 0
        6 5 4 3 | 4 3 2 1 | 0
        6 5 4 3 | 5 4 3 2 | 1 0
        6 5 4 3 | 6 5 4 3 | 2 1 0
        6 5 4 3 | 6 5 4 3 | 3 2 1 0
        """
    )
    got = matrix(DualChunk(chunk_size=6, local_size=2), 12)
    assert [row[: i + 1].tolist() for i, row in enumerate(got)] == expected


def test_figure_5a_of_the_one_million_report():
    got = matrix(DualChunk(chunk_size=7, local_size=2), 15)
    assert got[7, :8].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert got[8, :9].tolist() == [7, 6, 5, 4, 3, 3, 2, 1, 0]
    assert got[9, :10].tolist() == [7, 6, 5, 4, 3, 4, 3, 2, 1, 0]


def test_figure_2_of_the_paper():
    """The paper counts pretraining length c = 10 and clamps at c - 1."""
    got = matrix(DualChunk(chunk_size=9, local_size=3), 12)
    for row, own_chunk in ((9, 3), (10, 4), (11, 5)):
        assert got[row, :7].tolist() == [9, 8, 7, 6, 5, 4, own_chunk]


@pytest.mark.parametrize("chunk_size", range(1, 14))
def test_properties(chunk_size):
    for local_size in range((chunk_size - 1) // 2 + 1):
        dual_chunk = DualChunk(chunk_size, local_size)
        length = 4 * dual_chunk.chunk_length + 3
        got = matrix(dual_chunk, length)
        true = np.arange(length)[:, None] - np.arange(length)[None]
        past = true >= 0
        np.testing.assert_array_equal(
            got[past], relative_positions(range(length), range(length), chunk_size, local_size)[past]
        )
        assert got[past].min() >= 0
        assert got.max() == chunk_size
        near = past & (true <= local_size)
        np.testing.assert_array_equal(got[near], true[near])
        np.testing.assert_array_equal(
            got[: chunk_size + 1][past[: chunk_size + 1]], true[: chunk_size + 1][past[: chunk_size + 1]]
        )
