"""The programs of serving: those that `generate` runs, at the sizes of a request, on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.cache import empty_cache
from qwen2_jax.generation import trace_decode, trace_prefill
from qwen2_jax.model import abstract_params
from sharding.planner.request import ANSWER, Request
from sharding.rules import cache_shardings, param_shardings
from sharding.run import run_options

_DTYPE = jnp.bfloat16


def serving_program(request: Request, mesh: Mesh) -> Any:
    """The prefill of a batch of prompts with room for their answers, or the loop of decoding steps, traced."""
    config = request.config
    options = run_options(config, mesh, rules="serve")
    params = jax.tree.map(_placed, abstract_params(config, _DTYPE), param_shardings(config, mesh))
    if request.task == "prefill":
        return trace_prefill(config, params, request.batch, request.seq, ANSWER, options, _DTYPE)
    cache = jax.eval_shape(lambda: empty_cache(config, request.batch, request.seq, _DTYPE, layout=options.heads))
    cache = jax.tree.map(_placed, cache, cache_shardings(mesh, cache))
    return trace_decode(config, params, cache, ANSWER, options)


def _placed(array: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
