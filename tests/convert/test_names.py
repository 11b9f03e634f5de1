"""The table of names against the format, and against the model's own parameter tree."""

import math

import jax
import pytest

from convert.names import arrays_of, tensors_of
from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import abstract_params
from qwen2_jax.sizes import published


def flat_shapes(config):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("kind", ["dense", "tied", "moe", "mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_table_is_the_format(kind, fused, tools):
    config = Qwen2Config.from_hf(tools.configs[kind])
    assert tensors_of(arrays_of(config, fused)) == tools.spec_shapes(tools.configs[kind], fused)


@pytest.mark.parametrize("kind", ["dense", "tied", "moe", "mixed"])
def test_paths_and_shapes_are_the_models(kind, tools):
    config = Qwen2Config.from_hf(tools.configs[kind])
    assert {path: array.shape for path, array in arrays_of(config).items()} == flat_shapes(config)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("qwen2-0.5b", 290, 494_032_768),
        ("qwen2-1.5b", 338, 1_543_714_304),
        ("qwen2-7b", 339, 7_615_616_512),
        ("qwen2-72b", 963, 72_706_203_648),
        ("qwen2-57b-a14b", 5771, 57_408_658_944),
        ("qwen1.5-moe-a2.7b", None, 14_315_784_192),
    ],
)
def test_published_sizes(name, tensors, parameters):
    arrays = arrays_of(published(name))
    shapes = tensors_of(arrays)
    assert tensors is None or len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == sum(array.size for array in arrays.values()) == parameters
    assert {path: array.shape for path, array in arrays.items()} == flat_shapes(published(name))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["dense", "moe", "mixed"])
def test_pieces_cover_both_sides_exactly_once(kind, fused, tools):
    arrays = arrays_of(Qwen2Config.from_hf(tools.configs[kind]), fused)
    covered = {}
    for array in arrays.values():
        position = 0
        for piece in array.overlaps(0, array.size):
            assert piece.start == position
            position += piece.size
            covered.setdefault(piece.name, []).append((piece.offset, piece.size))
        assert position == array.size
    for name, shape in tensors_of(arrays).items():
        position = 0
        for offset, size in sorted(covered[name]):
            assert offset == position
            position += size
        assert position == math.prod(shape)
