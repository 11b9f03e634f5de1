"""Which implementation of attention each program of an evaluation takes, told without running it."""

import dataclasses
from typing import Any

import jax

from qwen2_jax.attention import choose
from qwen2_jax.config import Qwen2Config
from qwen2_jax.evaluation.completion import Programs
from qwen2_jax.evaluation.score_plan import Shape, Sizes
from qwen2_jax.layers import Options


@dataclasses.dataclass(frozen=True)
class Split:
    """How a mesh divides the work of attention."""

    rows: int = 1
    tensor: int = 1
    by_blocks: str = "chunked"


@dataclasses.dataclass(frozen=True)
class Paths:
    """Of one model, run in one way."""

    config: Qwen2Config
    dtype: Any
    """Of activations."""
    options: Options
    named: str | None
    """The implementation that was asked for, if any."""
    split: Split = Split()

    def prompts(self, rows: int, length: int) -> str:
        """Of whole prompts."""
        return self.named or self._chosen(rows, length, length, whole_rows=True)

    def behind(self, rows: int, queries: int, keys: int) -> str:
        """Of tokens that see others in a cache, which cuDNN cannot."""
        return self.named if self.named not in (None, "cudnn") else self._chosen(rows, queries, keys, whole_rows=False)

    def decoding(self, rows: int, keys: int) -> str:
        """Of single tokens, whatever was asked for."""
        return self._chosen(rows, 1, keys, whole_rows=False)

    def scores(self, shape: Shape, sizes: Sizes) -> tuple[str, ...]:
        """Of a batch of `Scorer`: of its prefixes, if it has any, and its rows."""
        if not shape.prefix:
            return (self.prompts(sizes.rows, shape.suffix),)
        rows = self.behind(sizes.rows, shape.suffix, shape.prefix + shape.suffix)
        return self.prompts(sizes.prefixes, shape.prefix), rows

    def completions(self, programs: Programs) -> tuple[str, ...]:
        """Of a batch of `Completer`: of its prefixes, if it has any, its prompts and its answers."""
        shape, sizes, prefix_chunk, chunk = programs
        read = shape.prefix + shape.suffix
        answers = self.decoding(sizes.rows, read + shape.answer)
        if not shape.prefix:
            return self._read(sizes.rows, shape.suffix, chunk), answers
        behind = self.behind(sizes.rows, chunk or shape.suffix, read)
        return self._read(sizes.prefixes, shape.prefix, prefix_chunk), behind, answers

    def _read(self, rows: int, length: int, chunk: int | None) -> str:
        return self.prompts(rows, length) if chunk is None else self.behind(rows, chunk, length)

    def _chosen(self, rows: int, queries: int, keys: int, whole_rows: bool) -> str:
        copies = self.options.heads.copies
        heads = max(self.config.num_attention_heads, self.config.num_key_value_heads * copies) // self.split.tensor
        rotations = 3 if self.config.dual_chunk else 1
        return choose(
            rows=-(-rows // self.split.rows) * heads * rotations,
            queries=queries,
            keys=keys,
            width=self.config.head_dim,
            dtype=self.dtype,
            whole_rows=whole_rows,
            chunk_length=self.config.dual_chunk.chunk_length if self.config.dual_chunk else 0,
            platform=jax.default_backend(),
            by_blocks=self.split.by_blocks,
        )
