"""A small random model that reads bytes, and the command as a user meets it."""

import json
import logging

import jax
import pytest

from convert import save_checkpoint
from qwen2_jax.cli import main
from qwen2_jax.commands import evaluate_lm_eval, evaluate_suite
from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import init_params
from qwen2_jax.tokenizer import Tokenizer
from tests.oracles.tokenizers import write_byte_tokenizer

CONFIG = Qwen2Config(
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.4,
    tie_word_embeddings=True,
)


@pytest.fixture(autouse=True)
def no_processes_to_join(monkeypatch):
    """Which would be too late, since JAX is running here."""
    for module in (evaluate_lm_eval, evaluate_suite):
        monkeypatch.setattr(module, "join", lambda options: not options.process)


@pytest.fixture(autouse=True)
def no_lines_of_other_commands():
    """A command lets its log appear for the rest of its process, which is over then elsewhere."""
    yield
    ours = logging.getLogger("qwen2_jax")
    ours.handlers.clear()
    ours.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="session")
def byte_files(tmp_path_factory):
    """A folder with a tokenizer of 256 bytes, whose ids are not the bytes' values, and the control tokens."""
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("bytes"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="session")
def model(params, byte_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save_checkpoint(folder, CONFIG, params, tokenizer_from=byte_files)
    return folder


@pytest.fixture(scope="session")
def bytes_tokenizer(byte_files):
    return Tokenizer.from_folder(byte_files)


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen_files):
    return Tokenizer.from_folder(qwen_files)


@pytest.fixture
def run(capsys):
    """Runs `qwen2-jax evaluate` in this process: exit status, standard output, standard error."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["evaluate", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Checks that the command ends with one line that names what is wrong."""

    def refused(*argv: object, because: str) -> None:
        code, out, err = run(*argv)
        assert (code, out) == (2, ""), err
        assert err.startswith("qwen2-jax: error: ") and err.count("\n") == 1, err
        assert because in err

    return refused
