"""Attention by cuDNN's fused kernels on NVIDIA GPUs, in parts that need no mask, merged in float32.

A mask is what to avoid: with one, cuDNN's backward pass yields NaN for some lengths where a row's log-sum-exp is below
-88, which Qwen2's heads do produce. Own chunk: causal. Chunk before: all keys. Earlier chunks: all keys, in one call.

Each part's backward call is given the output and log-sum-exp of the whole softmax. JAX has no public way to do that, so
this module reaches into `jax._src`; it is the only one that does.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.attention.context import Context
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.attention.flash import Kernel, flash_attention
from qwen2_jax.attention.softmax import merge
from qwen2_jax.dual_chunk import INTER, INTRA, SUCCESSIVE
from qwen2_jax.rope import Rotation, rotate, rotate_gradient

_ALIGNMENT = 128
"""cuDNN's backward pass is only trusted with lengths that are multiples of it."""

_WIDEST = 128
"""Of a head. Hopper takes twice as much, which no published model needs."""

_TRIAL_ERROR = 0.03
"""Rounding to bfloat16 comes to less than 0.01; NaN is more than anything."""

_LOG = logging.getLogger(__name__)


class _Part(NamedTuple):
    rotation: int
    queries: slice
    keys: slice
    causal: bool


def _parts(length: int, chunk: int) -> Iterator[list[_Part]]:
    """For each chunk of queries its parts; chunk 0 stands for one chunk of everything."""
    chunk = chunk or length
    for start in range(0, length, chunk):
        queries = slice(start, min(start + chunk, length))
        parts = [_Part(INTRA, queries, queries, causal=True)]
        if start >= chunk:
            parts.append(_Part(SUCCESSIVE, queries, slice(start - chunk, start), causal=False))
        if start >= 2 * chunk:
            parts.append(_Part(INTER, queries, slice(0, start - chunk), causal=False))
        yield parts


def _forward(query, key, value, rotation, context):
    length, chunk = _check(query, key, context)
    outs, lses = [], []
    for parts in _parts(length, chunk):
        total = None
        for part in parts:
            turned = rotate(query[:, :, :, part.queries], _angle(rotation, part))
            k, v = key[:, :, part.keys], value[:, :, part.keys]
            one = _ungrouped_call(_part_forward, turned, k, v, part.causal)
            total = one if total is None else merge(total, one)
        assert total is not None
        outs.append(total[0].astype(query.dtype))
        lses.append(total[1])
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _backward(query, key, value, rotation, context, out, lse, dout):
    length, chunk = _check(query, key, context)
    dkey, dvalue = jnp.zeros(key.shape), jnp.zeros(value.shape)
    dqueries = []
    for parts in _parts(length, chunk):
        dquery = jnp.zeros(())
        for part in parts:
            rows = (slice(None),) * 3 + (part.queries,)
            k, v = key[:, :, part.keys], value[:, :, part.keys]
            whole = out[rows], lse[rows], dout[rows]
            angle = _angle(rotation, part)
            turned = rotate(query[rows], angle)
            dturned, dk, dv = _ungrouped_call(_part_backward, turned, k, v, part.causal, *whole)
            dquery += rotate_gradient(dturned.astype(jnp.float32), angle)
            dkey = dkey.at[:, :, part.keys].add(dk.astype(jnp.float32))
            dvalue = dvalue.at[:, :, part.keys].add(dv.astype(jnp.float32))
        dqueries.append(dquery.astype(query.dtype))
    return jnp.concatenate(dqueries, axis=3), dkey.astype(key.dtype), dvalue.astype(value.dtype)


KERNEL = Kernel(_forward, _backward)


def refusal(dtype: jnp.dtype, width: int, whole_rows: bool, chunk_length: int) -> str | None:
    """Why these parts cannot express an attention, with what to do; None if they can.

    Args:
      dtype: of the query.
      width: of a head.
      whole_rows: as `Context` has it, like `chunk_length`.
      chunk_length: tokens of a chunk of Dual Chunk Attention, or 0.
    """
    if not whole_rows:
        return (
            "attention 'cudnn' computes whole rows of one document each: it does not go with segment_ids or positions; "
            "use 'chunked'"
        )
    if chunk_length % _ALIGNMENT:
        return (
            f"attention 'cudnn' needs chunks (chunk_size - local_size) of a multiple of {_ALIGNMENT} tokens, got "
            f"{chunk_length}; choose other sizes or use 'chunked'"
        )
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"attention 'cudnn' computes in bfloat16 or float16, got {dtype}; use 'chunked'"
    if width % 8 or width > _WIDEST:
        return f"attention 'cudnn' needs heads of a multiple of 8 up to {_WIDEST}, got {width}; use 'chunked'"
    return None


@functools.cache
def works(dtype: jnp.dtype, width: int) -> bool:
    """Whether cuDNN, as it is installed here, computes small parts and their gradients right. Tried once.

    The calls are private to JAX and the kernels are many: what nobody named is only taken after this.

    Args:
      dtype: of the query.
      width: of a head.
    """
    try:
        with jax.ensure_compile_time_eval():  # a program may be traced around this
            worst = _trial(dtype, width)
    except Exception as error:  # whatever a library that is missing, too old or broken comes up with
        _LOG.warning("attention without cuDNN, which does not run here: %s", str(error).partition("\n")[0])
        return False
    if not worst <= _TRIAL_ERROR:
        _LOG.warning("attention without cuDNN, which computes wrong numbers here: off by %.3g of the largest", worst)
        return False
    return True


def _trial(dtype: jnp.dtype, width: int) -> float:
    """The largest error of an output and gradients, in units of the largest number of each."""
    length = 2 * _ALIGNMENT + 9
    keys = jax.random.split(jax.random.key(0), 4)
    heads = ((1, 2, 2), (1, 2), (1, 2), (1, 2, 2))
    query, key, value, dout = (
        jax.random.normal(key, (*shape, length, width), jnp.float32).astype(dtype)
        for key, shape in zip(keys, heads, strict=True)
    )
    table = jnp.ones((1, 1, length, width // 2), jnp.float32)
    rotation = Rotation(table, table * 0)
    ones, zero = jnp.ones((1, length), jnp.int32), jnp.zeros((), jnp.int32)
    context = Context(zero, zero, ones, ones, whole_rows=True)

    def run(attention, dtype):
        inputs = (x.astype(dtype) for x in (query, key, value))
        turn = jax.tree.map(lambda x: x.astype(dtype), rotation)
        out, pull = jax.vjp(lambda *inputs: attention(*inputs, turn, context), *inputs)
        return [np.asarray(x, np.float32) for x in (out, *pull(dout.astype(dtype)))]

    right = run(dense_attention, jnp.float32)
    ours = run(functools.partial(flash_attention, KERNEL), dtype)
    return float(np.max([abs(a - b).max() / abs(b).max() for a, b in zip(ours, right, strict=True)]))


def _check(query: jax.Array, key: jax.Array, context: Context) -> tuple[int, int]:
    """T and the length of a chunk.

    Raises:
      ValueError: for what these parts cannot express.
    """
    reason = refusal(query.dtype, query.shape[4], context.whole_rows, context.chunk_length)
    if reason is not None:
        raise ValueError(reason)
    assert query.shape[3] == key.shape[2]
    return query.shape[3], context.chunk_length


def _angle(rotation: Rotation, part: _Part) -> Rotation:
    return jax.tree.map(lambda table: table[part.rotation, :, part.queries][:, None, None], rotation)


def _ungrouped_call(function, query, key, value, causal, *whole):
    """Calls a part's function in cuDNN's axes [B, N, T, H], with a whole number of blocks of queries.

    More queries than there are see nothing that matters: their output is cut off and their gradient is zero. Own keys
    are padded too, in the future of every real query; of earlier chunks there is a whole number of blocks.
    """
    batch, kv_heads, groups, queries, width = query.shape
    more = -queries % _ALIGNMENT

    def flat(x):
        x = x.reshape(batch, kv_heads * groups, queries, *x.shape[4:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3))

    def grouped(x):
        return x[:, :, :queries].reshape(batch, kv_heads, groups, queries, *x.shape[3:])

    keys = key.shape[2]
    if causal:
        key, value = (jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) for x in (key, value))
    results = function(flat(query), key, value, causal, width**-0.5, *map(flat, whole))
    if not whole:
        return tuple(map(grouped, results))
    dquery, dkey, dvalue = results
    return grouped(dquery), dkey[:, :, :keys], dvalue[:, :, :keys]


def _part_forward(query, key, value, causal, scale):
    """cuDNN's output [B, N, T, H] and log-sum-exp [B, N, T] float32."""
    cudnn = _cudnn()
    none = jnp.zeros(0, query.dtype)
    statics = _statics(cudnn, cudnn._dot_product_attention_fwd, scale, causal, return_residual=True)
    arguments = {name: none for name in _UNUSED}
    return cudnn._dot_product_attention_fwd(query=query, key=key, value=value, **arguments, **statics)[:2]


def _part_backward(query, key, value, causal, scale, out, lse, dout):
    """Gradients of query, key and value, given the output and log-sum-exp over these and all other keys."""
    cudnn = _cudnn()
    rule = cudnn._dot_product_attention_bwd_rule
    statics = _statics(cudnn, rule, scale, causal, return_residual=False)
    modifications = ((),) if "score_mod" in statics else ()
    unused = [jnp.zeros(0, query.dtype)] * len(_UNUSED)
    residuals = (query, key, value, *unused, *modifications, lse, out)
    return rule(**statics, res=residuals, grad_output=dout)[:3]


_UNUSED = ("bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v")


def _statics(cudnn, function, scale, causal, return_residual):
    """The arguments that say how, as far as this release of JAX has them."""
    mask = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
    values = {
        "score_mod_args": (),
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": mask,
        "layout": cudnn.AttentionLayout.BNTH.value,
        "sliding_window_length": None,
        "score_mod": None,
        "cudnn_version": cudnn.check_cudnn_version(),
        "is_training": True,
        "return_residual": return_residual,
    }
    known = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in known}


def _cudnn():
    if jax.default_backend() != "gpu":
        raise ValueError("attention 'cudnn' needs an NVIDIA GPU; use 'chunked' (or 'pallas' on TPU)")
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
