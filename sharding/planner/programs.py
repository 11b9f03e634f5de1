"""The programs of serving: what `generate` runs, at the sizes of a request, on a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.cache import Cache, empty_cache
from qwen2_jax.model import Output, Qwen2, abstract_params
from sharding.planner.request import Request
from sharding.rules import batch_sharding, cache_shardings, param_shardings
from sharding.run import run_options

_DTYPE = jnp.bfloat16


def serving_program(request: Request, mesh: Mesh, attention: str | None = None) -> tuple[Any, tuple[Any, ...]]:
    """Prefill (logits of the last token, into an empty cache) or one decoding step (the cache is used up).

    Args:
      attention: an implementation of `qwen2_jax.attention`; by default the kernel for prefill, and for decoding what
        the model chooses by size.

    Returns:
      A jitted function of (parameters, tokens, cache) and those as `jax.ShapeDtypeStruct`s on the mesh.
    """
    config, prefill = request.config, request.task == "prefill"
    if prefill:
        attention = attention or "pallas"
    options = run_options(config, mesh, rules="serve", attention=attention)
    model = Qwen2(config, stacked=True, options=options)

    def run(params, tokens: jax.Array, cache: Cache):
        out = model.apply({"params": params}, tokens, cache=cache, logits="last", right_padded=prefill)
        assert isinstance(out, Output)
        return out.cache, out.logits

    make = functools.partial(empty_cache, config, request.batch, request.seq, _DTYPE, True, options.heads)
    cache = jax.eval_shape(make)
    cache_at = cache_shardings(mesh, cache)
    shape = (request.batch, request.queries)
    params = abstract_params(config, _DTYPE, stacked=True)
    arguments = (
        jax.tree.map(_placed, params, param_shardings(config, mesh, stacked=True)),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, shape)),
        jax.tree.map(_placed, cache, cache_at),
    )
    return jax.jit(run, donate_argnums=2, out_shardings=(cache_at, None)), arguments


def _placed(array: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
