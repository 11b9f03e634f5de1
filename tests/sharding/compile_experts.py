"""Compiles a layer of experts that are split over four TPU v5p chips, on a machine without one.

Run by test_experts.py in a process of its own: libtpu reads its environment when JAX starts. Prints one JSON object:
how many exchanges of rows, and of numbers, each pass makes.
"""

import json
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax.moe import Experts, Routing
from sharding.experts import ExpertParallel
from sharding.mesh import make_mesh

WIDTH, INNER, EXPERTS, CHOICES = 256, 128, 8, 2


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    mesh = make_mesh("expert=4", topology.devices)
    # Room for all tokens in one round.
    parallel = ExpertParallel(mesh, variant="exchange", slack=4.0)

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec("expert")))

    x, weights = array(4, 256, WIDTH), array(4, 256, CHOICES)
    chosen, probabilities = array(4, 256, CHOICES, dtype=jnp.int32), array(4, 256, EXPERTS, dtype=jnp.float32)
    expand, contract = array(EXPERTS, INNER, WIDTH), array(EXPERTS, WIDTH, INNER)

    def forward(chosen, probabilities, *given):
        x, weights, experts = given
        return parallel(x, Routing(weights, chosen, probabilities), experts)[0]

    def backward(chosen, probabilities, dout, *given):
        return jax.vjp(lambda *given: forward(chosen, probabilities, *given), *given)[1](dout)

    given = x, weights, Experts(expand, expand, contract)
    report = {}
    for run, arguments in ((forward, given), (backward, (x, *given))):
        traced = jax.jit(run).trace(chosen, probabilities, *arguments)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        report[run.__name__] = {
            "ragged": len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)),
            "padded": len(re.findall(r" all-to-all(?:-start)?\(", text)),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
