"""Compiles a sparse layer over four TPU v5p chips, on a machine without one: what runs while rows are on their way?

Run by test_experts.py in a process of its own: libtpu reads its environment when JAX starts. Prints one JSON object:
how many exchanges of rows leave time for other work, how many products the shared expert has, and how many of them run
in that time.
"""

import json
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.model import abstract_params
from sharding import make_mesh, param_shardings, run_options
from sharding.experts import ExpertParallel

CONFIG = Qwen2Config(
    vocab_size=256,
    hidden_size=1024,
    intermediate_size=1024,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=4096,
)


_EDGES = "start", "done"


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    mesh = make_mesh("expert=4", topology.devices)
    options = run_options(CONFIG, mesh)._replace(moe=ExpertParallel(mesh, variant="exchange", slack=4.0))
    params = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        abstract_params(CONFIG, jnp.bfloat16),
        param_shardings(CONFIG, mesh),
    )
    tokens = jax.ShapeDtypeStruct((4, 2048), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("expert")))

    def forward(params, tokens):
        return Qwen2(CONFIG, options=options).apply({"params": params}, tokens, logits="none").hidden

    text = jax.jit(forward).trace(params, tokens).lower(lowering_platforms=("tpu",)).compile().as_text()
    lines = text[text.index("\nENTRY ") :].splitlines()  # in the order in which they run
    starts, ends = ([at for at, line in enumerate(lines) if f" ragged-all-to-all-{edge}(" in line] for edge in _EDGES)
    products = [at for at, line in enumerate(lines) if re.search(r"/shared_expert/.*/dot_general", line)]
    within = [at for at in products if any(start < at < end for start, end in zip(starts, ends, strict=True))]
    print(json.dumps({"exchanges": len(starts), "products": len(products), "meanwhile": len(within)}))


if __name__ == "__main__":
    main()
