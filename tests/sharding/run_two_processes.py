"""One of two processes with four simulated devices each; run by test_processes.py. Prints "equal" for each part."""

import contextlib
import sys
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from convert import files
from convert.checkpoint import open_checkpoint
from convert.load import load_open
from qwen2_jax import generate
from qwen2_jax.layers import Options
from sharding import batch_sharding, make_mesh, param_shardings, run_options
from sharding.processes import join_processes, leave_processes
from tests.sharding.models import MODELS, assert_equal_to_one_device, batch, loss_and_gradients, parameters
from tests.sharding.specs import ACTIVATIONS, LOGITS, Watched, assert_split, assert_weights

DENSE_MESHES = [spec for spec in ACTIVATIONS if "expert" not in spec]
MOE_MESHES = [spec for spec in ACTIVATIONS if "expert" in spec] + [
    "fsdp=8",
    "tensor=8",
    "context=8",
    "data=2,fsdp=4",
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,context=2,tensor=2",
    "context=2,tensor=4",
]
MESHES = {name: MOE_MESHES if config.is_moe else DENSE_MESHES for name, config in MODELS.items()}
LOADS = [("fsdp=8", False), ("fsdp=8", True), ("data=2,fsdp=4", True), ("fsdp=2,tensor=4", False), ("tensor=8", True)]


def everywhere(tree, mesh):
    """Arrays of which this process has parts, whole, as numpy."""
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)


def spread(tree, shardings):
    """Arrays that every process has, over the devices of both."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i]), tree, shardings
    )


def compare(name, spec):
    """Values, gradients and specs of a model on a mesh."""
    config, mesh = MODELS[name], make_mesh(spec)
    params = spread(parameters(config), param_shardings(config, mesh, stacked=True))
    tokens, segments = (spread(x, batch_sharding(mesh, x.shape)) for x in batch())
    options = run_options(config, mesh)
    placement = Watched(mesh, options.placement.rules)
    result = loss_and_gradients(params, tokens, segments, config, options._replace(placement=placement))
    assert_equal_to_one_device(config, everywhere(result, mesh))
    placement.assert_activations(spec)
    assert_split(result[0][1][0].sharding, ACTIVATIONS[spec][LOGITS], mesh, "logits")
    for tree in (params, result[1]):
        assert_weights(jax.tree.map(lambda array: array.sharding, tree), spec, mesh)


@contextlib.contextmanager
def counting():
    """Of every number of bytes read from files of weights."""
    sizes = []

    def read_at(path, offset, *buffers, **options):
        sizes.append(sum(memoryview(buffer).nbytes for buffer in buffers))
        files.read_at(path, offset, *buffers, **options)

    with mock.patch("convert.native.read_at", read_at), mock.patch("convert.safetensors_files.read_at", read_at):
        yield sizes


def load(folder, spec, stacked):
    """Each process reads little more than its devices hold, and they get the file's numbers."""
    mesh, source = make_mesh(spec), open_checkpoint(folder)
    with counting() as read:
        config, params = load_open(source, mesh=mesh, stacked=stacked)
    shardings = param_shardings(config, mesh, stacked)
    assert jax.tree.map(lambda array: array.sharding, params) == shardings
    held = sum(
        shard.data.nbytes
        for array in jax.tree.leaves(params)
        for shard in {str(shard.index): shard for shard in array.addressable_shards}.values()
    )
    assert sum(read) <= 1.1 * held, f"{sum(read)} bytes read for {held}"
    with jax.default_device(jax.local_devices()[0]):
        _, alone = load_open(source, stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, everywhere(params, mesh), jax.device_get(alone))


def continue_prompts(folder):
    mesh, prompts = make_mesh("fsdp=2,tensor=4"), batch()[0][:3]
    config, params = load_open(open_checkpoint(folder), mesh=mesh)
    with jax.default_device(jax.local_devices()[0]):
        _, plain = load_open(open_checkpoint(folder))
        alone = generate(config, plain, prompts, max_new_tokens=8, options=Options())
    together = generate(config, params, prompts, max_new_tokens=8, options=run_options(config, mesh, rules="serve"))
    np.testing.assert_array_equal(together, alone)


def main(coordinator: str, process: str, *folders: str) -> None:
    assert join_processes(coordinator, 2, int(process))
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    for folder in folders:
        for spec, stacked in LOADS:
            load(folder, spec, stacked)
            print("equal: loaded from", folder, spec, flush=True)
    continue_prompts(folders[0])
    print("equal: generation from a checkpoint", flush=True)
    for name, meshes in MESHES.items():
        for spec in meshes:
            compare(name, spec)
            print("equal:", name, spec, flush=True)
        jax.clear_caches()  # programs take memory
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
