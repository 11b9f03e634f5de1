"""Dual Chunk Attention: ordinary causal attention whose RoPE distances never exceed what the model was trained on.

Tokens are cut into chunks by their position. A key is rotated to its place in its chunk, once; a query is rotated three
times, for the keys of its own chunk (intra), of the chunk before (successive) and of all earlier ones (inter). Every
query still sees every earlier key, under one softmax.

Source: Training-Free Long-Context Scaling (arXiv 2402.17463), section 3, with the sizes as the released code and
config.json spell them: `chunk_size` bounds the distance, chunks hold `chunk_size - local_size` tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

INTRA, SUCCESSIVE, INTER = range(3)
"""The parts of the attention; a query and a key so many chunks apart (or more) belong to it."""

TEMPERATURES = ("query", "prompt")

_SPARSE = "sparse_attention_"
_MOST = 1 << 30  # positions are int32


@dataclasses.dataclass(frozen=True)
class DualChunk:
    """`dual_chunk_attention_config` of config.json; field names are the keys there.

    Raises:
      ValueError: if the sizes do not fit together.
    """

    chunk_size: int
    """C, the largest distance that RoPE gets to see; at most the trained length."""
    local_size: int
    """l: distances up to it stay exact across the border of two chunks."""
    original_max_position_embeddings: int = 0
    """Trained length beyond which scores are multiplied by T(n)^2, T(n) = 0.1 ln(n / length) + 1; 0 leaves them.

    Source: Qwen2.5-1M technical report (arXiv 2501.15383), equation 1.
    """
    temperature: str = "query"
    """Which length n is. "query": the tokens up to and including the query, so that a token's output depends on what
    stands before it and on nothing else, and decoding equals prefill. "prompt": as vLLM, the whole prompt for every
    query and key of it, for generated tokens the tokens so far; a prompt's output then depends on its length."""

    def __post_init__(self):
        for name in ("chunk_size", "local_size", "original_max_position_embeddings"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _MOST:
                raise ValueError(
                    f"dual chunk attention: {name} must be a whole number from 0 to {_MOST}, got {value!r}"
                )
        if self.local_size >= self.chunk_size:
            raise ValueError(
                f"dual chunk attention: local_size ({self.local_size}) must be smaller than chunk_size "
                f"({self.chunk_size}): a chunk holds chunk_size - local_size tokens"
            )
        if self.local_size >= self.chunk_length:
            raise ValueError(
                f"dual chunk attention: local_size ({self.local_size}) must be smaller than the {self.chunk_length} "
                f"tokens of a chunk (chunk_size - local_size), or distances within it would not be exact; with "
                f"chunk_size {self.chunk_size} it can be at most {(self.chunk_size - 1) // 2}"
            )
        if self.temperature not in TEMPERATURES:
            expected = ", ".join(TEMPERATURES)
            raise ValueError(f"dual chunk attention: temperature must be one of {expected}, got {self.temperature!r}")

    @classmethod
    def from_hf(cls, block: Any) -> "DualChunk":
        """Reads the block of config.json.

        Raises:
          ValueError: for unknown or missing keys, sizes that do not fit, or sparse attention switched on.
        """
        if not isinstance(block, Mapping):
            raise ValueError(f"dual_chunk_attention_config must be an object, got {block!r}")
        sparse = block.get("sparse_attention_config")
        if block.get("sparse_attention_enabled", sparse is not None):
            raise ValueError(
                "dual_chunk_attention_config: sparse attention is an approximation that is not supported; set "
                "sparse_attention_enabled to false for exact attention"
            )
        given = {key: value for key, value in block.items() if not key.startswith(_SPARSE)}
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(given.keys() - names):
            raise ValueError(f"dual_chunk_attention_config: unknown keys {unknown}")
        if missing := [key for key in ("chunk_size", "local_size") if given.get(key) is None]:
            raise ValueError(f"dual_chunk_attention_config: {' and '.join(missing)} missing")
        return cls(**{key: value for key, value in given.items() if value is not None})

    def to_hf(self) -> dict[str, Any]:
        """The block for config.json."""
        block = dataclasses.asdict(self)
        if self.temperature == "query":
            del block["temperature"]  # a key of this project's own
        return block

    @property
    def chunk_length(self) -> int:
        """s, the tokens of a chunk."""
        return self.chunk_size - self.local_size

    def key_positions(self, positions: Any) -> Any:
        """Where keys at `positions` (an integer array) are rotated to."""
        return positions % self.chunk_length

    def query_positions(self, positions: Any) -> tuple[Any, Any, Any]:
        """Where queries at `positions` (an integer array) are rotated to for keys INTRA, SUCCESSIVE and INTER."""
        intra = positions % self.chunk_length
        successive = (intra + self.chunk_length).clip(max=self.chunk_size)
        return intra, successive, intra * 0 + self.chunk_size
