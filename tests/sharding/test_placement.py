"""The gradient of a table that was read by rows, on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.placement import added_rows
from sharding import make_mesh
from sharding.placement import MeshWeight
from sharding.planner.hlo import arrays, collectives, parse

V, D = 64, 32


def inputs(rows: int):
    keys = jax.random.split(jax.random.key(0))
    return jax.random.randint(keys[0], (rows, 16), 0, V, jnp.int32), jax.random.normal(keys[1], (rows, 16, D))


def on_mesh(spec: str):
    weight = MeshWeight(make_mesh(spec), ("vocab", "embed"))
    return jax.jit(lambda rows, drows: weight.added_rows((V, D), rows, drows))


@pytest.mark.parametrize("spec", ["fsdp=2,context=2,tensor=2", "fsdp=4,expert=2", "data=2,fsdp=2,tensor=2", "tensor=8"])
@pytest.mark.parametrize("rows", [8, 3])  # three rows are split over no axis
def test_equals_one_device(spec, rows):
    given = inputs(rows)
    np.testing.assert_allclose(on_mesh(spec)(*given), added_rows((V, D), *given), rtol=1e-5, atol=1e-5)


def test_rows_outside_of_the_table_are_left_out():
    rows, drows = jnp.asarray([[-1, 0, 1, 2]], jnp.int32), jnp.ones((1, 4, 1))
    np.testing.assert_array_equal(added_rows((2, 1), rows, drows), [[1.0], [1.0]])


def test_no_device_adds_up_a_whole_table():
    program = parse(on_mesh("data=2,fsdp=2,tensor=2").lower(*inputs(8)).compile().as_text())
    found = collectives(program, {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2})
    reduced = [array for one in found if one.kind == "all-reduce" for array in arrays(one.shape)]
    assert reduced == [("f32", (V // 2, D // 2))]
