"""How a checkpoint wants to be sampled, and that a damaged or odd file is refused rather than guessed at."""

import json

import pytest

from qwen2_jax.generation_config import GenerationConfig
from qwen2_jax.json_object import parse_json, read_json_object
from qwen2_jax.sampling import Sampling
from tests.oracles.published import INSTRUCT


def test_what_files_say(tmp_path):
    path = tmp_path / "generation_config.json"
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig()
    path.write_text(json.dumps(INSTRUCT))
    expected = GenerationConfig(Sampling(0.7, 20, 0.8, 1.05), (151645, 151643), 151643)
    assert GenerationConfig.from_folder(tmp_path) == expected
    path.write_text(json.dumps({"do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048}))
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig(Sampling(), (151643,), 0, 2048)
    path.write_text(json.dumps({"do_sample": True, "top_p": 0.8}))
    assert GenerationConfig.from_folder(tmp_path).sampling == Sampling(1.0, 50, 0.8)


def test_ids_of_config_json(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "pad_token_id": 8, "temperature": 0.5}')
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig(eos_ids=(7,), pad_id=8)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": null}')
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig(eos_ids=(1, 2), pad_id=8)
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id must be a token id"):
        GenerationConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"max_new_tokens": -5}', "max_new_tokens must be a whole number from 1"),
        ('{"max_new_tokens": 2.7}', "max_new_tokens must be a whole number from 1"),
        ('{"do_sample": "false"}', "do_sample must be true or false, got 'false'"),
        ('{"eos_token_id": true}', "eos_token_id must be a token id"),
        ('{"eos_token_id": [1, "2"]}', "eos_token_id must be a token id"),
        ('{"eos_token_id": {"a": 1}}', "eos_token_id must be a token id"),
        ('{"pad_token_id": -1}', "pad_token_id must be a whole number from 0"),
        ('{"pad_token_id": 5000000000}', "pad_token_id must be a whole number from 0"),
        ('{"top_k": "many"}', "top_k must be a whole number from 0"),
        ('{"temperature": [1]}', "temperature must be a number"),
        ('{"do_sample": true, "temperature": 1e-300}', "float32, .*got 1e-300"),
        ('{"do_sample": true, "top_p": 1e-300}', "float32, .*got 1e-300"),
        ('{"repetition_penalty": 1e39}', "float32, .*got 1e\\+39"),
        (f'{{"repetition_penalty": 1{"0" * 400}}}', "float32"),
        ('{"temperature": 1e999}', "not a number that a float64 can hold"),
        ('{"temperature": NaN}', "NaN is not a JSON number"),
        ('{"top_k": 1, "top_k": 2}', "'top_k' is given twice"),
        ("[]", "expected an object"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_refuses(text, complaint, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{complaint}"):
        GenerationConfig.from_folder(tmp_path)


@pytest.mark.parametrize("value", [1e-46, 1e-40, 1e-300, 1e39, float("inf"), float("nan"), 10**400])
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_sampling_is_of_numbers_that_float32_holds(name, value):
    with pytest.raises(ValueError, match=rf"{name}|float32"):
        Sampling(**{name: value})


def test_json_is_utf8_and_small(tmp_path):
    with pytest.raises(ValueError, match="x is not JSON that can be read: 'utf-8' codec"):
        parse_json(b'"\xff"', "x")
    (tmp_path / "x").write_bytes(b" " * 10_000_001)
    with pytest.raises(ValueError, match="x is longer than 10000000 bytes"):
        read_json_object(tmp_path / "x")
