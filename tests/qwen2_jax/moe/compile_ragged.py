"""Compiles the ragged backend, forward and backward, for a TPU v5p, on a machine without one.

Run by test_backends.py in a process of its own: libtpu reads its environment when JAX starts. Prints one JSON object.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qwen2_jax.moe import Experts, moe, route

TOKENS, WIDTH, INNER, EXPERTS, CHOICES = 512, 512, 384, 16, 4


def run(x, logits, experts):
    def loss(x, logits, experts):
        return moe(x, route(logits, CHOICES, False), experts, "ragged").astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(x, logits, experts)


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    sharding = SingleDeviceSharding(topology.devices[0])

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    expand, contract = (EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER)
    masters = Experts(array(jnp.float32, *expand), array(jnp.float32, *expand), array(jnp.float32, *contract))
    x, logits = array(jnp.bfloat16, TOKENS, WIDTH), array(jnp.bfloat16, TOKENS, EXPERTS)
    compiled = jax.jit(run).trace(x, logits, masters).lower(lowering_platforms=("tpu",)).compile()
    shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    print(
        json.dumps(
            {
                "flops": compiled.cost_analysis()["flops"],
                "products": 3 * 3 * 2 * TOKENS * CHOICES * WIDTH * INNER,
                "largest": max(math.prod(map(int, shape.split(","))) for shape in shapes),
                "largest_expected": max(EXPERTS * WIDTH * INNER, TOKENS * CHOICES * WIDTH),
            }
        )
    )


if __name__ == "__main__":
    main()
