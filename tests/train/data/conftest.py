"""A tokenizer of 257 tokens: a token per byte, and the one that ends documents."""

import json

import numpy as np
import pytest

from tests.oracles.tokenizers import write_byte_tokenizer
from train.data.encode import END_OF_DOCUMENT, Encoding
from train.data.store import TokenStore
from train.data.tokenize import tokenize


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), [END_OF_DOCUMENT])


@pytest.fixture(scope="session")
def how(tokenizer_folder):
    return Encoding(str(tokenizer_folder))


@pytest.fixture(scope="session")
def make_store(tmp_path_factory, how):
    """A function that tokenizes texts, and gives the store."""

    def make(texts, **options) -> TokenStore:
        folder = tmp_path_factory.mktemp("store")
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "texts.jsonl").write_text(lines)
        tokenize([str(folder / "texts.jsonl")], folder / "tokens", how, workers=0, **options)
        return TokenStore(folder / "tokens")

    return make


@pytest.fixture(scope="session")
def store(make_store):
    """60 documents of 1 to 41 tokens, in several files; no two alike."""
    letters = np.random.default_rng(0)
    texts = [f"{n:02d}" + "".join(letters.choice([*"abcdef"], int(letters.integers(0, 39)))) for n in range(60)]
    return make_store(texts, part_size=400)
