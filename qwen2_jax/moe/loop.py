"""The reference: a loop over experts, each of which runs over every row."""

import jax
import jax.numpy as jnp

from qwen2_jax.moe.experts import Experts, swiglu
from qwen2_jax.projection import project


def loop(rows: jax.Array, expert_of_row: jax.Array, experts: Experts) -> jax.Array:
    """Each row through its expert, as `qwen2_jax.moe.Backend`."""
    total = jnp.zeros_like(rows)
    for e in range(experts.gate.shape[0]):
        hidden = swiglu(project("XD,FD->XF", rows, experts.gate[e]), project("XD,FD->XF", rows, experts.up[e]))
        out = project("XF,DF->XD", hidden, experts.down[e])
        total += jnp.where((expert_of_row == e)[:, None], out, jnp.zeros_like(out))
    return total
