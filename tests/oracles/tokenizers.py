"""A tokenizer of bytes, for models that are too small for Qwen's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

QWEN2_PIECES = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def qwen2_rules() -> dict[str, Any]:
    """What tokenizer.json says of them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), QWEN2_PIECES
    rules = json.loads(backend.to_str())
    return {name: rules[name] for name in ("normalizer", "pre_tokenizer")}


def write_byte_tokenizer(folder: Path, tokens: Sequence[str] = ()) -> Path:
    """Writes tokenizer.json into a folder, made if need be, and gives the folder.

    The ids of the 256 bytes are not their values; the control `tokens` come after them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), QWEN2_PIECES
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(tokens))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder
