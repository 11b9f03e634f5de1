"""Checkpoints of random weights to measure with, of any size, never in memory as a whole."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from convert.chunks import chunk_shape, chunks_of
from convert.dtypes import weight_dtype
from convert.hugging_face import HuggingFaceSink
from convert.names import arrays_of
from qwen2_jax.config import Qwen2Config
from qwen2_jax.sizes import PUBLISHED, SHAPE_1_5B

TINY = Qwen2Config(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SIZES = {"tiny": TINY, **PUBLISHED}


def config_of(nbytes: float) -> Qwen2Config:
    """A model of about `nbytes` in bfloat16: Qwen2-1.5B with as many layers as that takes (and fewer words, if few)."""
    shape = SHAPE_1_5B
    vocabulary = min(shape.vocab_size, int(nbytes / 4 / shape.hidden_size) + 1)
    shape = dataclasses.replace(shape, vocab_size=vocabulary, num_hidden_layers=1)
    rest = sum(array.size for path, array in arrays_of(shape).items() if not path.startswith("layers_0."))
    layer = sum(array.size for path, array in arrays_of(shape).items() if path.startswith("layers_0."))
    return dataclasses.replace(shape, num_hidden_layers=max(1, math.ceil((nbytes / 2 - rest) / layer)))


def write_random(folder: Path, config: Qwen2Config, dtype: str, shard_size: int = 5 * 10**9) -> int:
    """Makes a Hugging Face folder of normal weights, norms of 1 and small biases; returns the bytes of its weights."""
    number = weight_dtype(dtype)
    arrays = arrays_of(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "torch_dtype": dtype}))
    sink = HuggingFaceSink(folder, arrays, dict.fromkeys(arrays, number), shard_size)
    # A prime number of them: each chunk begins elsewhere in the pool, so that no two layers are the same.
    count = 16_777_259
    pool = np.random.default_rng(0).standard_normal(count, np.float32) * np.float32(config.initializer_range)
    pool = np.tile(pool.astype(number), 2)
    ones, position = np.ones(config.hidden_size, number), 0
    for path, array in arrays.items():
        for chunk in chunks_of(array.shape, chunk_shape(array.shape, number.itemsize)):
            size = chunk.stop - chunk.start
            sink.write(path, chunk, ones if path.endswith("scale") else pool[position : position + size])
            position = (position + size) % count
    sink.finish()
    return sum(array.size for array in arrays.values()) * number.itemsize
