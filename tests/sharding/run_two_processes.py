"""One of two processes with four simulated devices each; run by test_processes.py. Prints "equal" for each part."""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from convert import load_checkpoint
from qwen2_jax import generate
from qwen2_jax.layers import Options
from sharding import batch_sharding, make_mesh, param_shardings, run_options
from sharding.processes import join_processes
from tests.sharding.models import MODELS, assert_equal_to_one_device, batch, loss_and_gradients, parameters

CASES = [
    ("dense", "data=2,fsdp=4"),
    ("dense", "tensor=8"),  # a product's parts are summed over both processes
    ("dense, dual-chunk", "context=4,fsdp=2"),
    ("moe", "expert=8"),
    ("moe, dual-chunk", "fsdp=2,expert=2,context=2"),
]


def everywhere(tree):
    """Arrays of which this process has parts, whole, as numpy."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def spread(tree, shardings):
    """Arrays that every process has, over the devices of both."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i]), tree, shardings
    )


def main(coordinator: str, process: str, checkpoint: str) -> None:
    assert join_processes(coordinator, 2, int(process))
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    for name, spec in CASES:
        config, mesh = MODELS[name], make_mesh(spec)
        params = spread(parameters(config), param_shardings(config, mesh, stacked=True))
        tokens, segments = (spread(x, batch_sharding(mesh, x.shape)) for x in batch())
        result = loss_and_gradients(params, tokens, segments, config, run_options(config, mesh))
        assert_equal_to_one_device(config, everywhere(result))
        print("equal:", name, spec, flush=True)

    mesh = make_mesh("fsdp=2,tensor=4")
    config, params = load_checkpoint(checkpoint, mesh=mesh)
    prompts = batch()[0][:3]
    with jax.default_device(jax.local_devices()[0]):
        alone = generate(*load_checkpoint(checkpoint), prompts, max_new_tokens=8, options=Options())
    together = generate(config, params, prompts, max_new_tokens=8, options=run_options(config, mesh, rules="serve"))
    np.testing.assert_array_equal(together, alone)
    print("equal: generation from a checkpoint", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
