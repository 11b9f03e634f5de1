"""What each of several processes reads of a checkpoint, and that chunks come together again."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from convert.chunks import chunk_shape, chunks_of
from convert.load import shared_arrays
from convert.names import arrays_of
from qwen2_jax.sizes import published
from sharding.mesh import MESH_AXES, MeshSpec
from sharding.rules import param_shardings


@dataclasses.dataclass(frozen=True)
class PretendedDevice:
    id: int
    process_index: int
    platform: str = "tpu"


def pretended_mesh(text, devices_of_a_process):
    spec = MeshSpec.parse(text)
    devices = [PretendedDevice(number, number // devices_of_a_process) for number in range(spec.devices)]
    return Mesh(np.array(devices).reshape(tuple(spec.sizes.values())), MESH_AXES, axis_types=(AxisType.Auto,) * 5)


class Shapes:
    """A source of bfloat16 without numbers."""

    def __init__(self, config):
        self.config, self.arrays = config, arrays_of(config)
        self.dtypes = dict.fromkeys(self.arrays, np.dtype(jnp.bfloat16))

    def chunks(self, path):
        shape = self.arrays[path].shape
        return list(chunks_of(shape, chunk_shape(shape, 2)))


def flat(tree):
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def numbers_of(boxes, chunks):
    """How many numbers the boxes hold, and how many there are in the chunks that any of them meets."""
    met = [
        chunk.stop - chunk.start
        for chunk in chunks
        if any(
            all(low < side.stop and side.start < high for (low, high), side in zip(box, chunk.box, strict=True))
            for box in boxes
        )
    ]
    return sum(int(np.prod([high - low for low, high in box])) for box in boxes), sum(met)


def bytes_of_processes(text, devices_of_a_process, name):
    """By process: the bytes of its devices' parts, those it reads, and those of all chunks that its parts meet."""
    source, mesh = Shapes(published(name)), pretended_mesh(text, devices_of_a_process)
    shardings = flat(param_shardings(source.config, mesh))
    order = sorted(source.arrays, key=lambda path: -source.arrays[path].size)
    shared = shared_arrays(source, {path: [path] for path in order}, shardings)
    needed, read, met = Counter(), Counter(), Counter()
    known = {}
    for path in order:
        shape, chunks = source.arrays[path].shape, source.chunks(path)
        if (shape, shardings[path]) not in known:
            boxes = {}
            for device, index in shardings[path].devices_indices_map(shape).items():
                box = tuple(side.indices(size)[:2] for side, size in zip(index, shape, strict=True))
                boxes.setdefault(device.process_index, set()).add(box)
            known[shape, shardings[path]] = {process: numbers_of(own, chunks) for process, own in boxes.items()}
        for process, (own, in_chunks) in known[shape, shardings[path]].items():
            needed[process] += 2 * own
            met[process] += 2 * in_chunks
            read[process] += 0 if path in shared else 2 * in_chunks
        if path in shared:
            each = shared[path].shape[0] // mesh.size
            assert len(set(shared[path].slots)) == len(chunks)
            for slot, chunk in zip(shared[path].slots, chunks, strict=True):
                read[mesh.devices.flat[slot // each].process_index] += 2 * (chunk.stop - chunk.start)
    return needed, read, met


@pytest.mark.parametrize(
    ("name", "mesh", "devices", "of_chunks"),
    [
        ("qwen2-7b", "fsdp=128", 4, 0.8),  # what would be read otherwise, of 1/32
        ("qwen2-7b", "fsdp=8", 4, 0.9),
        ("qwen2-7b", "fsdp=32,tensor=4", 4, 0.8),
        ("qwen2-72b", "fsdp=64", 1, 0.6),
        ("qwen2-57b-a14b", "fsdp=8,expert=16", 8, 0.5),
    ],
)
def test_each_process_reads_its_share(name, mesh, devices, of_chunks):
    needed, read, met = bytes_of_processes(mesh, devices, name)
    total = 2 * sum(array.size for array in Shapes(published(name)).arrays.values())
    assert len(needed) == MeshSpec.parse(mesh).devices // devices
    for process, share in needed.items():
        assert share < 1.2 * total / len(needed)  # and little that is on all devices
        assert read[process] <= 1.1 * share
        assert met[process] > of_chunks * total
    assert sum(read.values()) >= total


def test_nothing_is_dealt_out_to_processes_that_read_their_own_parts_anyway():
    source = Shapes(published("qwen2-7b"))
    for text in ("data=2,tensor=4", "fsdp=4,tensor=2"):  # the second within each of them
        mesh = pretended_mesh(text, 4)
        paths = {path: [path] for path in source.arrays}
        shared = shared_arrays(source, paths, flat(param_shardings(source.config, mesh)))
        assert bool(shared) == (text == "fsdp=4,tensor=2")
