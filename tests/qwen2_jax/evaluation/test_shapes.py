"""Shapes are merged where that costs least."""

import time

import numpy as np

from qwen2_jax.evaluation.score_plan import Shape
from qwen2_jax.evaluation.shapes import merge_shapes


def slots(shapes, rows):
    return shapes.sum(-1) * rows


def test_merging_takes_the_shapes_that_lie_next_to_each_other():
    rows = {Shape(0, 16): 10, Shape(0, 32): 1, Shape(0, 512): 3, Shape(64, 16): 5}
    merged = merge_shapes(rows, 3, slots)
    assert merged == {**{shape: shape for shape in rows}, Shape(0, 16): Shape(0, 32)}
    assert set(merge_shapes(rows, 1, slots).values()) == {Shape(0, 512), Shape(64, 16)}


def test_merging_goes_on_below_the_limit_where_that_costs_less():
    def cost(shapes, rows):
        """Of batches of any number of rows, each of which takes 100 besides."""
        return slots(shapes, rows) + 100

    rows = {Shape(0, 16): 2, Shape(0, 32): 2, Shape(0, 512): 3}
    assert merge_shapes(rows, 3, cost) == {**{shape: shape for shape in rows}, Shape(0, 16): Shape(0, 32)}
    assert merge_shapes({Shape(0, 16): 1}, 1, cost) == {Shape(0, 16): Shape(0, 16)}


def test_merging_many_shapes_takes_no_minutes():
    generator = np.random.default_rng(0)
    rows = {Shape(*map(int, pair)): 1 for pair in generator.integers(0, 2000, (1500, 2))}
    begin = time.perf_counter()
    assert len(set(merge_shapes(rows, 6, slots).values())) == 6
    assert time.perf_counter() - begin < 30
