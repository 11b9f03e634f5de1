"""Inputs for the paths of attention, and what they are held to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax.attention import Context, attend
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.config import Qwen2Config
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.model import default_positions, shown_lengths
from qwen2_jax.rope import Rotation, rotate, rotations
from tests.oracles import attention as oracle

THETA = 100.0


@dataclasses.dataclass
class Case:
    """Queries, keys (not rotated) and values of whole rows, with the documents and positions they belong to."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    dout: jax.Array
    segments: np.ndarray
    positions: np.ndarray
    dual_chunk: DualChunk | None = None

    @property
    def config(self) -> Qwen2Config:
        _, _, heads, width = self.query.shape
        return Qwen2Config(
            *(8, 8, 8, 1, heads, self.key.shape[1]), head_dim=width, rope_theta=THETA, dual_chunk=self.dual_chunk
        )

    def context(self) -> Context:
        zero = jnp.zeros((), jnp.int32)
        segments = jnp.asarray(self.segments)
        if self.dual_chunk is None:
            return Context(zero, zero, segments, segments, aligned=True)
        chunks = jnp.asarray(self.positions // self.dual_chunk.chunk_length)
        return Context(zero, zero, segments, segments, chunks, chunks, aligned=True)

    def rotations(self):
        positions = jnp.asarray(self.positions)
        lengths = shown_lengths(jnp.asarray(self.segments), positions)
        return rotations(self.config, positions, lengths, self.query.dtype)

    def rotated_key(self, key=None):
        cos, sin = self.rotations().key
        return rotate(self.key if key is None else key, Rotation(cos[:, None], sin[:, None]))

    def expected(self):
        """The oracle's output."""
        slots = np.arange(self.segments.shape[1])
        seen = (slots[None, :, None] >= slots[None, None]) & (self.segments[:, :, None] == self.segments[:, None])
        seen &= self.segments[:, None] != 0
        distances = self.positions[:, :, None] - self.positions[:, None]
        temperatures = np.ones(distances.shape)
        if (dual_chunk := self.dual_chunk) is not None:
            distances = np.stack(
                [
                    oracle.relative_positions(row, row, dual_chunk.chunk_size, dual_chunk.local_size)
                    for row in self.positions
                ]
            )
            if trained := dual_chunk.original_max_position_embeddings:
                lengths = self.positions + 1
                if dual_chunk.temperature == "prompt":
                    documents = self.segments[:, :, None] == self.segments[:, None]
                    lengths = np.where(documents, self.positions[:, None], 0).max(axis=-1) + 1
                by_token = np.maximum(1, 0.1 * np.log(lengths / trained) + 1)
                temperatures = (by_token**2)[:, :, None] * np.ones_like(temperatures)
        frequencies = THETA ** (-np.arange(0, self.query.shape[-1], 2) / self.query.shape[-1])
        return oracle.attention(self.query, self.key, self.value, distances, seen, frequencies, temperatures)


def make(segments, heads=4, kv_heads=2, width=8, seed=0, dual_chunk=None, dtype=jnp.float32) -> Case:
    segments = np.asarray(segments, np.int32)
    batch, length = segments.shape
    q, k, v, dout = jax.random.split(jax.random.key(seed), 4)
    return Case(
        query=jax.random.normal(q, (batch, length, heads, width), dtype),
        key=jax.random.normal(k, (batch, kv_heads, length, width), dtype),
        value=jax.random.normal(v, (batch, kv_heads, length, width), dtype),
        dout=jax.random.normal(dout, (batch, length, heads, width), dtype),
        segments=segments,
        positions=np.asarray(default_positions(jnp.asarray(segments))),
        dual_chunk=dual_chunk,
    )


def value_and_gradient(implementation, query, key, value, dout, rotation, context):
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, rotation, context, implementation), query, key, value)
    return out, *pull(dout)


def assert_paths_agree(case, implementation, relative=1e-4):
    """Holds value and gradients to the dense path's, which are automatic differentiation's; returns the value."""
    arguments = (case.query, case.rotated_key(), case.value, case.dout, case.rotations().query, case.context())
    paths = implementation, dense_attention
    both = jax.jit(lambda *arguments: [value_and_gradient(path, *arguments) for path in paths])
    (ours, *our_gradients), (reference, *gradients) = both(*arguments)
    np.testing.assert_allclose(ours, reference, atol=1e-5)
    for gradient, expected in zip(our_gradients, gradients, strict=True):
        # A row that sees a single key has no gradient in query and key: of nothing, only rounding is left.
        assert np.abs(gradient - expected).max() <= relative * max(np.abs(expected).max(), 1e-2)
    return ours
