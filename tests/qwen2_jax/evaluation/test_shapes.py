"""Shapes are merged where that costs least."""

from qwen2_jax.evaluation.score_plan import Shape
from qwen2_jax.evaluation.shapes import merge_shapes


def test_merging_takes_the_shapes_that_lie_next_to_each_other():
    rows = {Shape(0, 16): 10, Shape(0, 32): 1, Shape(0, 512): 3, Shape(64, 16): 5}
    merged = merge_shapes(rows, 3)
    assert merged == {**{shape: shape for shape in rows}, Shape(0, 16): Shape(0, 32)}
    assert set(merge_shapes(rows, 1).values()) == {Shape(0, 512), Shape(64, 16)}


def test_merging_goes_on_below_the_limit_where_that_costs_less():
    def cost(shapes, rows):
        """Of batches of any number of rows, each of which takes 100 besides."""
        return shapes.sum(-1) * rows + 100 * (rows > 0)

    rows = {Shape(0, 16): 2, Shape(0, 32): 2, Shape(0, 512): 3}
    assert merge_shapes(rows, 3, cost) == {**{shape: shape for shape in rows}, Shape(0, 16): Shape(0, 32)}
    assert merge_shapes({Shape(0, 16): 1}, 1, cost) == {Shape(0, 16): Shape(0, 16)}
