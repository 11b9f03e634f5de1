"""Attention as one Pallas kernel for TPU, and two for its gradient.

The arithmetic is that of `chunked`; what differs is where things are. A step of the grid is one pair of blocks that
matters (`pallas_steps`), plain or Dual Chunk: the query is turned in fast memory by every rotation as its block begins,
and a step picks the one it needs. Whatever belongs to queries has tokens along the lanes, [H, T], and scores are
[S, T]: a maximum or a sum over keys then runs down the sublanes and gives one row, the halves that RoPE mixes are whole
registers, and a head of 64 fills them as well as one of 128.

Off TPU the kernels are interpreted: right, and very slow.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen2_jax.attention.context import Context, in_blocks, pad
from qwen2_jax.attention.flash import Kernel
from qwen2_jax.attention.pallas_steps import MOST_BLOCKS, Step, steps, unpacked
from qwen2_jax.attention.softmax import FLOOR, MASKED, nonzero
from qwen2_jax.rope import Rotation

BLOCK_QUERIES = 1024
BLOCK_KEYS = 1024
"""Tokens per block of two-byte elements, at most; half of it for float32. Multiples of 128.

By the compiler's schedule for v5e with H = 128, a forward step without a mask is 5,100 bundles at 1024 by 1024 and
1,330 at 512 by 512, and 400 more go into the step itself whatever its size; so the larger blocks win, although the
diagonal wastes more of them. Of the 16 MiB of fast memory that a kernel gets by default, the three need 8.0, 12.4 and
13.8 MiB with three rotations: operands and results twice, as they are loaded ahead (3 to 4 MiB), scratch (1 to 2.3),
and scores and weights in float32, 4 MiB each.
"""

_MOST_STEPS = 3 << 16
"""Of all rows: their words fill three quarters of the 1 MiB of scalar memory."""

_LANES = 128
_LOG2E = math.log2(math.e)
_FLOOR = FLOOR * _LOG2E
"""Scores in the kernels are logarithms to base 2, as the hardware's exponential takes them."""


class _Sizes(NamedTuple):
    """What the kernels are compiled for: the shapes of their operands, after padding to whole blocks."""

    batch: int
    kv_heads: int
    groups: int
    queries: int
    keys: int
    width: int
    rotations: int
    q_block: int
    k_block: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def q_blocks(self) -> int:
        return self.queries // self.q_block

    @property
    def k_blocks(self) -> int:
        return self.keys // self.k_block

    @property
    def steps(self) -> int:
        """Of a row's list, at most."""
        return self.q_blocks * self.k_blocks


class _Operands(NamedTuple):
    """What every kernel reads; inside a kernel, a block of each."""

    words: Any
    """[B * steps] int32, the packed steps."""
    starts: Any
    """[2] int32: the slots of the first query and of the first key."""
    query: Any
    """[B, N, H, T]."""
    key: Any
    """[B, K, S, H]."""
    value: Any
    """[B, K, S, H]."""
    cos: Any
    """[R, B, H/2, T]."""
    sin: Any
    q_tags: Any
    """[B, 2, T] int32: document, -1 for padding, and chunk."""
    k_tags: Any
    """[B, 8, S] int32: document, 0 for padding, and chunk; the rest fills a tile, so that it can be transposed."""


_READ = len(_Operands._fields)


def _forward_kernel(sizes, *refs):
    blocks, (out, lse), (turned, top, total, acc) = _Operands(*refs[:_READ]), refs[_READ:-4], refs[-4:]
    step = _step(sizes, blocks)

    @pl.when(step.begins == 1)
    def _():
        for part in range(sizes.rotations):
            turned[part] = _turned(blocks, part)
        top[...] = jnp.full_like(top, _FLOOR)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def meet(part, seen):
        scores = seen(_product(blocks.key[...], turned[part], (1, 0)))
        old_top = top[...]
        new_top = jnp.maximum(old_top, scores.max(axis=0, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        shrink = jnp.exp2(old_top - new_top)
        top[...] = new_top
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        value = blocks.value[...]
        acc[...] = acc[...] * shrink + _product(value, weights.astype(value.dtype), (0, 0))

    _meet(sizes, blocks, step, step.outer, step.inner, meet)

    @pl.when(step.ends == 1)
    def _():
        weight = nonzero(total[...])
        out[...] = (acc[...] / weight).astype(out.dtype)
        lse[...] = (top[...] + jnp.log2(weight)) * (1 / _LOG2E)


def _query_gradient_kernel(sizes, *refs):
    blocks, (dout, lse, delta, dquery), (turned, acc) = _Operands(*refs[:_READ]), refs[_READ:-2], refs[-2:]
    step = _step(sizes, blocks)

    @pl.when(step.begins == 1)
    def _():
        for part in range(sizes.rotations):
            turned[part] = _turned(blocks, part)
        acc[...] = jnp.zeros_like(acc)

    def meet(part, seen):
        _, dscores = _weights(blocks, turned[part], seen, dout[...], lse[...], delta[...])
        key = blocks.key[...]
        acc[part] += _product(key, dscores.astype(key.dtype), (0, 0))

    _meet(sizes, blocks, step, step.outer, step.inner, meet)

    @pl.when(step.ends == 1)
    def _():
        back = jnp.zeros(dquery.shape, jnp.float32)
        for part in range(sizes.rotations):
            back += _rotated(acc[part], blocks.cos[part], -blocks.sin[part])
        dquery[...] = (back * sizes.width**-0.5).astype(dquery.dtype)


def _key_value_gradient_kernel(sizes, *refs):
    blocks, (dout, lse, delta, dkey, dvalue) = _Operands(*refs[:_READ]), refs[_READ:-2]
    dkey_sum, dvalue_sum = refs[-2:]
    step, group = _step(sizes, blocks), pl.program_id(3)

    @pl.when((step.begins == 1) & (group == 0))
    def _():
        dkey_sum[...] = jnp.zeros_like(dkey_sum)
        dvalue_sum[...] = jnp.zeros_like(dvalue_sum)

    def meet(part, seen):
        turned = _turned(blocks, part)
        weights, dscores = _weights(blocks, turned, seen, dout[...], lse[...], delta[...])
        dvalue_sum[...] += _product(weights.astype(dout.dtype), dout[...], (1, 1))
        dkey_sum[...] += _product(dscores.astype(turned.dtype), turned, (1, 1))

    _meet(sizes, blocks, step, step.inner, step.outer, meet)

    @pl.when((step.ends == 1) & (group == sizes.groups - 1))
    def _():
        # The turned query carries the scale already, and a factor of log2(e) too many.
        dkey[...] = (dkey_sum[...] * (1 / _LOG2E)).astype(dkey.dtype)
        dvalue[...] = dvalue_sum[...].astype(dvalue.dtype)


def _step(sizes: _Sizes, blocks: _Operands) -> Step:
    return unpacked(blocks.words[pl.program_id(0) * sizes.steps + pl.program_id(2)])


def _turned(blocks: _Operands, part) -> jax.Array:
    """[H, T]: a block of queries turned by a rotation and scaled, so that scores need no factor."""
    query = blocks.query[...]
    factor = query.shape[0] ** -0.5 * _LOG2E
    return (_rotated(query, blocks.cos[part], blocks.sin[part]) * factor).astype(query.dtype)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [H, T] turned by cos and sin [H/2, T]: float32."""
    half = x.shape[0] // 2
    first, second, cos, sin = (y.astype(jnp.float32) for y in (x[:half], x[half:], cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=0)


def _weights(blocks: _Operands, turned, seen, dout, lse, delta):
    """The softmax's weights [S, T] and the gradient of the scores, float32, of one rotation in a step."""
    weights = jnp.exp2(seen(_product(blocks.key[...], turned, (1, 0))) - lse)
    dweights = _product(blocks.value[...], dout, (1, 0))
    return weights, weights * (dweights - delta)


def _product(a: jax.Array, b: jax.Array, dims: tuple[int, int]) -> jax.Array:
    """The product of two matrices, summed over one dim of a and one of b: float32, and exact as `einsum` is."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((dims[0],), (dims[1],)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def _meet(sizes: _Sizes, blocks: _Operands, step: Step, q_block, k_block, body):
    """Runs body(part, seen) for each rotation of a step; seen(scores [S, T]) masks what a query does not see."""

    @pl.when(step.open == 1)
    def _():
        body(step.first, lambda scores: scores)

    def masked(part, _):
        body(part, lambda scores: jnp.where(_visible(sizes, blocks, q_block, k_block, part), scores, MASKED))

    @pl.when(step.open == 0)
    def _():
        lax.fori_loop(step.first, step.stop, masked, None)


def _visible(sizes: _Sizes, blocks: _Operands, q_block, k_block, part) -> jax.Array:
    """[S, T] bool: which keys of a block the queries of another see, by one rotation."""
    keys, queries = blocks.k_tags[...].T, blocks.q_tags[...]
    shape = sizes.k_block, sizes.q_block
    ahead = lax.broadcasted_iota(jnp.int32, shape, 0) - lax.broadcasted_iota(jnp.int32, shape, 1)
    allowed = (blocks.starts[0] + q_block * sizes.q_block) - (blocks.starts[1] + k_block * sizes.k_block)
    seen = (ahead <= allowed) & (keys[:, 0:1] == queries[0:1])
    if sizes.rotations > 1:
        seen &= jnp.clip(queries[1:2] - keys[:, 1:2], 0, sizes.rotations - 1) == part
    return seen


class _Specs(NamedTuple):
    """How arrays are cut into the blocks of a step."""

    query: pl.BlockSpec
    """Also for whatever has its shape."""
    row: pl.BlockSpec
    """One number per query and head, [B, N, 1, T]."""
    key: pl.BlockSpec
    table: pl.BlockSpec
    q_tags: pl.BlockSpec
    k_tags: pl.BlockSpec


def _specs(sizes: _Sizes, by_keys: bool) -> _Specs:
    def place(b, head, s, *rest):
        """Row, head, key/value head, block of queries and block of keys at a point of the grid."""
        *group, words, _ = rest
        step = unpacked(words[b * sizes.steps + s])
        if by_keys:
            return b, head * sizes.groups + group[0], head, step.inner, step.outer
        return b, head, lax.div(head, jnp.int32(sizes.groups)), step.outer, step.inner

    def spec(shape, index: Callable):
        return pl.BlockSpec(shape, lambda *point: index(*place(*point)))

    width, q_block, k_block = sizes.width, sizes.q_block, sizes.k_block
    return _Specs(
        query=spec((None, None, width, q_block), lambda b, n, k, i, j: (b, n, 0, i)),
        row=spec((None, None, 1, q_block), lambda b, n, k, i, j: (b, n, 0, i)),
        key=spec((None, None, k_block, width), lambda b, n, k, i, j: (b, k, j, 0)),
        table=spec((sizes.rotations, None, width // 2, q_block), lambda b, n, k, i, j: (0, b, 0, i)),
        q_tags=spec((None, 2, q_block), lambda b, n, k, i, j: (b, 0, i)),
        k_tags=spec((None, 8, k_block), lambda b, n, k, i, j: (b, 0, j)),
    )


def _run(kernel, products, sizes: _Sizes, context: Context, operands: _Operands, more, results, scratch, by_keys=False):
    """Runs a kernel over the steps of a context.

    Args:
      products: of matrices, per step.
      more: what the kernels of the backward pass read besides, (dout, log-sum-exp to base 2, delta).
      results: a (spec, array shape, dtype) for each.
      scratch: a (shape, dtype) for each.
    """
    listed = steps(context, sizes.rotations, sizes.q_block, sizes.k_block, by_keys)
    specs = _specs(sizes, by_keys)
    q, k, row, table = specs.query, specs.key, specs.row, specs.table
    inputs = (q, k, k, table, table, specs.q_tags, specs.k_tags, *((q, row, row) if more else ()))
    # Rows, heads, steps; for each pair of blocks of a key/value head, the query heads that share it.
    heads, shared = (sizes.kv_heads, (sizes.groups,)) if by_keys else (sizes.heads, ())
    order: Any = ("parallel", "parallel", "arbitrary", "arbitrary")[: 3 + len(shared)]
    pairs = sizes.batch * sizes.heads * sizes.queries * sizes.keys // 2  # if causal

    def call(longest, *arrays, interpret):
        return pl.pallas_call(
            functools.partial(kernel, sizes),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(sizes.batch, heads, longest, *shared),
                in_specs=inputs,
                out_specs=[getattr(specs, name) for name, _, _ in results],
                scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in results],
            compiler_params=pltpu.CompilerParams(dimension_semantics=order),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * sizes.width * pairs,
                transcendentals=pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            ),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*arrays)

    # By where the program is to run, whatever machine compiles it.
    compiled, interpreted = (functools.partial(call, interpret=interpret) for interpret in (False, True))
    arrays = (*operands._replace(words=listed.words.reshape(-1)), *more)
    return lax.platform_dependent(listed.longest, *arrays, tpu=compiled, default=interpreted)


def _prepared(query, key, value, rotation: Rotation, context: Context) -> tuple[_Sizes, _Operands, Context]:
    """Sizes, operands (the steps still missing) and context, in whole blocks and with chunks in any case."""
    batch, kv_heads, groups, queries, width = query.shape
    parts = rotation.cos.shape[0]
    shrink = max(1, query.dtype.itemsize // 2)
    q_block, k_block = _block(queries, BLOCK_QUERIES // shrink), _block(key.shape[2], BLOCK_KEYS // shrink)
    pad_q, pad_k = functools.partial(pad, size=q_block), functools.partial(pad, size=k_block)

    labels = q_segments, k_segments, q_chunks, k_chunks = in_blocks(context, parts, q_block, k_block)
    context = Context(context.query_start, context.key_start, *labels)

    cos, sin = (pad_q(table.swapaxes(2, 3), 3) for table in rotation)
    operands = _Operands(
        words=None,
        starts=jnp.stack([context.query_start, context.key_start]),
        query=pad_q(_columns(query), 3),
        key=pad_k(key, 2),
        value=pad_k(value, 2),
        cos=cos,
        sin=sin,
        q_tags=jnp.stack([jnp.where(q_segments == 0, -1, q_segments), q_chunks], axis=1),
        k_tags=jnp.pad(jnp.stack([k_segments, k_chunks], axis=1), ((0, 0), (0, 6), (0, 0))),
    )
    shapes = operands.query.shape[3], operands.key.shape[2]
    sizes = _Sizes(batch, kv_heads, groups, *shapes, width, parts, q_block, k_block)
    if batch * sizes.steps > _MOST_STEPS or max(sizes.q_blocks, sizes.k_blocks) > MOST_BLOCKS:
        raise ValueError(
            f"pallas attention: {batch} rows of {sizes.q_blocks} by {sizes.k_blocks} blocks on one device, but at most "
            f"{_MOST_STEPS} pairs and {MOST_BLOCKS} blocks can be listed; give a device fewer rows, or use 'chunked'"
        )
    return sizes, operands, context


def _block(tokens: int, most: int) -> int:
    """The size of a block: whole registers, and as little padding as the number of blocks allows."""
    size = math.ceil(tokens / math.ceil(tokens / most))
    return min(most, math.ceil(size / _LANES) * _LANES)


def _columns(x: jax.Array) -> jax.Array:
    """[B, K, G, T, H] -> [B, N, H, T]."""
    batch, kv_heads, groups, queries, width = x.shape
    return x.reshape(batch, kv_heads * groups, queries, width).swapaxes(2, 3)


def _forward(query, key, value, rotation: Rotation, context: Context):
    sizes, operands, context = _prepared(query, key, value, rotation, context)
    shape, row = operands.query.shape, (1, sizes.q_block)
    out, lse = _run(
        *(_forward_kernel, 2, sizes, context, operands, ()),
        results=[("query", shape, query.dtype), ("row", (*shape[:2], 1, shape[3]), jnp.float32)],
        scratch=[
            ((sizes.rotations, sizes.width, sizes.q_block), query.dtype),
            *((row, jnp.float32), (row, jnp.float32), ((sizes.width, sizes.q_block), jnp.float32)),
        ],
    )
    queries = query.shape[3]
    out, lse = out[..., :queries].swapaxes(2, 3), lse[..., :queries]
    return out.reshape(query.shape), lse.reshape(query.shape[:-1])


def _backward(query, key, value, rotation: Rotation, context: Context, out, lse, dout):
    sizes, operands, context = _prepared(query, key, value, rotation, context)
    # Row sums of dP * P, by way of out and its gradient; as an einsum it would keep float32 copies of both.
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
    lse, delta = (x.reshape(sizes.batch, sizes.heads, 1, -1) for x in (lse * _LOG2E, delta))
    more = tuple(pad(x, 3, sizes.q_block) for x in (_columns(dout), lse, delta))

    block = (sizes.rotations, sizes.width, sizes.q_block)
    (dquery,) = _run(
        *(_query_gradient_kernel, 3, sizes, context, operands, more),
        results=[("query", operands.query.shape, query.dtype)],
        scratch=[(block, query.dtype), (block, jnp.float32)],
    )
    dkey, dvalue = _run(
        *(_key_value_gradient_kernel, 4, sizes, context, operands, more),
        results=[("key", operands.key.shape, key.dtype), ("key", operands.value.shape, value.dtype)],
        scratch=[((sizes.k_block, sizes.width), jnp.float32)] * 2,
        by_keys=True,
    )
    dquery = dquery[..., : query.shape[3]].swapaxes(2, 3).reshape(query.shape)
    return dquery, dkey[:, :, : key.shape[2]], dvalue[:, :, : key.shape[2]]


KERNEL = Kernel(_forward, _backward)
