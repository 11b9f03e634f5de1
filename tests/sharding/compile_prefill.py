"""Compiles the prefill of 131,072 tokens by the 7B model for four TPU v5p chips, on a machine without one.

Run by test_tpu.py in a process of its own: libtpu reads its environment when JAX starts. Prints one JSON object.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2_jax.cache import empty_cache
from qwen2_jax.layers import Options
from qwen2_jax.long_context import LongContext
from qwen2_jax.model import Qwen2, abstract_params
from qwen2_jax.sizes import published
from sharding.attention import SplitAttention
from sharding.rules import param_shardings

TOKENS = 131072


def main(implementation: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    mesh = Mesh(np.array(topology.devices), ("tensor",), axis_types=(AxisType.Auto,))
    config = LongContext("dca-temperature").configure(published("qwen2-7b-instruct"), TOKENS)
    options = Options(attention=SplitAttention(mesh, implementation))
    params = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        abstract_params(config, jnp.bfloat16, stacked=True),
        param_shardings(config, mesh, stacked=True),
    )
    tokens = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def prefill(params, tokens):
        cache = empty_cache(config, 1, TOKENS, jnp.bfloat16, stacked=True)
        by_head = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
        cache = cache.replace(layers=jax.lax.with_sharding_constraint(cache.layers, by_head))
        out = Qwen2(config, options=options).apply({"params": params}, tokens, cache=cache, logits="last")
        return out.cache, out.logits

    compiled = prefill.trace(params, tokens).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    print(
        json.dumps(
            {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
                "kernels": text.count('custom_call_target="tpu_custom_call"'),
                "all_gathers": text.count(" all-gather("),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
