"""The digest of arrays: what it is, that files and devices agree on it, and that no change of a number escapes it."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert.digest import Digest
from sharding import make_mesh
from tests.xla import optimized
from train.digest import digests, sums

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint32, np.uint8, np.bool_]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 5), (300, 700)]


def plain(array: np.ndarray) -> str:
    """The definition, number by number, in Python's integers."""
    sums = [0, 0]
    lanes = [
        (0x9E3779B1, 0x85EBCA77, 16, 0x7FEB352D, 15, 0x846CA68B, 16),
        (0xC2B2AE3D, 0x27D4EB2F, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
    ]
    width = array.shape[-1] if array.shape else 1
    for place, number in enumerate(array.reshape(-1)):
        bits = int.from_bytes(number.tobytes(), "little")
        for lane, (row, column, a, m, b, n, c) in enumerate(lanes):
            x = (bits + place // width * row + place % width * column) % 2**32
            x = (x ^ x >> a) * m % 2**32
            x = (x ^ x >> b) * n % 2**32
            sums[lane] += x ^ x >> c
    return "".join(f"{value % 2**32:08x}" for value in sums)


def random_array(shape, dtype) -> np.ndarray:
    draw = np.random.default_rng(0)
    if dtype is np.bool_:
        return draw.integers(2, size=shape).astype(bool)
    size = np.dtype(dtype).itemsize
    return np.frombuffer(draw.bytes(int(np.prod(shape)) * size), dtype).reshape(shape)  # NaNs of every kind included


def on_device(array: np.ndarray) -> str:
    return digests({"x": jnp.asarray(array)})["x"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_equals_the_definition(shape, dtype):
    array = random_array(shape, dtype)
    whole = Digest(shape)
    whole.add(array, (0,) * len(shape))
    assert on_device(array) == whole.text() == plain(array)


def test_parts_in_any_order_make_the_whole():
    array = random_array((6, 4, 10), np.float32)
    parts = Digest(array.shape)
    for i, j, k in reversed(list(itertools.product((0, 2, 4), (0, 1), (0, 5)))):
        parts.add(array[i : i + 2, j::1, k : k + 5][:, : 1 if j == 0 else None], (i, j, k))
    assert parts.text() == plain(array)


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [
        ("data=8", PartitionSpec()),
        ("fsdp=4,tensor=2", PartitionSpec("fsdp", "tensor")),
        ("fsdp=2,tensor=4", PartitionSpec(None, ("tensor", "fsdp"))),
        ("data=2,fsdp=4", PartitionSpec(None, "fsdp")),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_does_not_depend_on_the_mesh(mesh, spec, dtype):
    array = random_array((16, 24), dtype)
    placed = jax.device_put(array, NamedSharding(make_mesh(mesh), spec))
    assert digests({"a": placed, "b": jnp.asarray(array)}) == dict.fromkeys("ab", plain(array))


def test_any_single_flipped_bit_changes_both_sums():
    array = random_array((16, 32), np.float32)
    before = on_device(array)
    for place, bit in itertools.product(range(0, 512, 37), range(32)):
        damaged = array.copy()
        damaged.reshape(-1).view(np.uint32)[place] ^= 1 << bit
        after = on_device(damaged)
        assert after[:8] != before[:8] and after[8:] != before[8:]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: np.roll(x, 1),
        lambda x: np.roll(x, 1, axis=1),
        lambda x: x[[1, 0, *range(2, len(x))]],
        lambda x: np.concatenate([x[:8], x[:8]]),
        lambda x: np.where(np.arange(32) < 16, x, 0).astype(x.dtype),
    ],
)
def test_numbers_in_other_places_are_another_array(change):
    array = np.random.default_rng(1).standard_normal((16, 32), np.float32)
    assert on_device(np.ascontiguousarray(change(array))) != on_device(array)


def test_equal_numbers_of_other_bits_differ():
    assert on_device(np.float32([0.0])) != on_device(np.float32([-0.0]))


def test_random_keys_have_one():
    key = jax.random.key(3)
    assert digests({"key": key})["key"] == plain(np.asarray(jax.random.key_data(key)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_copy_of_the_array_is_made(dtype):
    with optimized():
        memory = jax.jit(sums).lower(jax.ShapeDtypeStruct((4, 1024, 1024), dtype)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096
