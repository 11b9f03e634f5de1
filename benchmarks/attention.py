"""Dual Chunk Attention beside plain attention of the same path, forward and backward, and the work that each does."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from benchmarks import machine
from qwen2_jax.attention import Context, attend, chunked
from qwen2_jax.config import Qwen2Config
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.rope import Rotation, rotate, rotations

HEADS, KV_HEADS, WIDTH = 4, 2, 64
_PRODUCTS = 2 + 5
"""Matrix products with the scores' shape: queries with keys and weights with values; in the backward pass five."""


def measure(
    lengths: Sequence[int], dual_chunk: DualChunk, implementation: str, dtype: str, repeats: int
) -> dict[str, Any]:
    device = jax.devices()[0]
    results = []
    for length in lengths:
        machine.say(f"{length} tokens ...")
        kinds = {"plain": None, "dual chunk": dual_chunk}
        runs = {name: _program(length, chunks, implementation, dtype) for name, chunks in kinds.items()}
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - begin)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results.append(
            {
                "tokens": length,
                "seconds": seconds,
                "medians": medians,
                "ratio": medians["dual chunk"] / medians["plain"],
                "macs": {name: _macs(length, chunks) for name, chunks in kinds.items()},
                "macs_minimum": length * (length + 1) // 2 * HEADS * WIDTH * _PRODUCTS,
            }
        )
    return {
        "benchmark": "attention",
        "device_kind": device.device_kind,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "implementation": implementation,
        "dtype": dtype,
        "chunk_size": dual_chunk.chunk_size,
        "local_size": dual_chunk.local_size,
        "heads": [HEADS, KV_HEADS, WIDTH],
        "repeats": repeats,
        "results": results,
    }


def _config(dual_chunk: DualChunk | None) -> Qwen2Config:
    return Qwen2Config(*(8, HEADS * WIDTH, 8, 1, HEADS, KV_HEADS), rope_theta=1e6, dual_chunk=dual_chunk)


def _context(length: int, dual_chunk: DualChunk | None) -> Context:
    positions, zero = jnp.arange(length, dtype=jnp.int32)[None], jnp.zeros((), jnp.int32)
    size = dual_chunk.chunk_length if dual_chunk else 0
    chunks = positions // size if size else None
    one = jnp.ones_like(positions)
    return Context(zero, zero, one, one, chunks, chunks, chunk_length=size, whole_rows=True)


def _program(length: int, dual_chunk: DualChunk | None, implementation: str, dtype: str):
    """A compiled call that returns the output and the gradients of query, key and value, after its first run."""
    config, context = _config(dual_chunk), _context(length, dual_chunk)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    turns = rotations(config, positions, positions + length, dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    query, dout = (jax.random.normal(key, (1, length, HEADS, WIDTH), dtype) for key in keys[:2])
    key, value = (jax.random.normal(key, (1, KV_HEADS, length, WIDTH), dtype) for key in keys[2:])
    key = rotate(key, Rotation(*(table[:, None] for table in turns.key)))

    @jax.jit
    def run(query, key, value, dout, rotation, context):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, rotation, context, implementation), query, key, value)
        return out, pull(dout)

    arguments = query, key, value, dout, turns.query, context
    jax.block_until_ready(run(*arguments))
    return lambda: run(*arguments)


def _macs(length: int, dual_chunk: DualChunk | None) -> int:
    """Multiply-adds that the chunked path executes, both passes."""
    parts = 1 if dual_chunk is None else 3
    steps = int(jax.jit(chunked.steps, static_argnums=1)(_context(length, dual_chunk), parts))
    block = min(chunked.BLOCK, length)
    return steps * block * block * HEADS * WIDTH * _PRODUCTS
