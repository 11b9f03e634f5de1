"""The benchmarks run from end to end at a toy size; what they measure there means nothing."""

import importlib.util
import json

import pytest

from benchmarks import table
from benchmarks.__main__ import main
from benchmarks.checkpoints import config_of
from benchmarks.worker import Worker
from convert.names import arrays_of

COMPARED = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))


def page(folder, kind):
    """A Markdown file with an empty block for the benchmark `kind`."""
    path = folder / "page.md"
    path.write_text(f"before\n\n{table._begin(kind)}\nwhat stood here\n{table._end(kind)}\n\nafter\n")
    return path


@pytest.mark.slow
def test_speed(tmp_path, capsys):
    markdown = page(tmp_path, "speed")
    arguments = ["--size", "tiny", "--dtype", "float32", "--repeats", "1", "--scratch", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--markdown", str(markdown)]) == 0

    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["cpu"] and report["machine"]["date"]
    assert report["frameworks"]["qwen2-jax"]["versions"]["jax"]
    results = {result["measure"]: result for result in report["results"]}
    both = {"qwen2-jax", "transformers"} if COMPARED else {"qwen2-jax"}
    for line in ("prefill of 512 tokens", "decoding step, batch 1", "decoding step, batch 8"):
        assert results[line]["medians"].keys() == both
        assert results[line]["medians"]["qwen2-jax"] > 0
        assert results[line].get("same_tokens", True)
    for line in ("loading, Hugging Face folder", "whole run, peak memory"):
        assert (results[line]["ratio"] is not None) == COMPARED
    assert results["loading, converted folder"]["medians"].keys() == {"qwen2-jax"}
    assert results["whole run, peak memory"]["medians"]["qwen2-jax"] > 50e6

    assert "decoding step, batch 8" in capsys.readouterr().out
    text = markdown.read_text()
    assert text.startswith("before\n\n<!--") and text.endswith("-->\n\nafter\n")
    assert "| prefill of 512 tokens |" in text and "what stood here" not in text
    assert not list(tmp_path.glob("qwen2-jax-benchmark-*"))


def test_convert(tmp_path):
    markdown = page(tmp_path, "convert")
    arguments = ["convert", "--gigabytes", "0.1", "--repeats", "1", "--scratch", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--markdown", str(markdown)]) == 0

    report = json.loads((tmp_path / "out.json").read_text())
    results = {result["measure"]: result for result in report["results"]}
    assert results.keys() == {"sha256sum + cp", "sha256sum + cp + sync", "from-hf", "to-hf"}
    for job in ("from-hf", "to-hf"):
        assert 50e6 < results[job]["peak_memory"] < 512e6
    assert "| from-hf |" in markdown.read_text()


def test_attention(tmp_path):
    markdown = page(tmp_path, "attention")
    arguments = ["attention", "--lengths", "64", "96", "--chunk-size", "20", "--local-size", "4", "--repeats", "1"]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--markdown", str(markdown)]) == 0

    report = json.loads((tmp_path / "out.json").read_text())
    assert [result["tokens"] for result in report["results"]] == [64, 96]
    for result in report["results"]:
        assert result["medians"].keys() == result["macs"].keys() == {"plain", "dual chunk"}
        assert result["macs_minimum"] <= result["macs"]["plain"] <= result["macs"]["dual chunk"]
    assert "| 96 |" in markdown.read_text()


@pytest.mark.slow
def test_moe(tmp_path):
    markdown = page(tmp_path, "moe")
    arguments = ["moe", "--size", "tiny", "--dtype", "float32", "--repeats", "1"]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--markdown", str(markdown)]) == 0

    report = json.loads((tmp_path / "out.json").read_text())
    sides = {"qwen2-jax", "dense einsum", "8 devices, exchange", "8 devices, gather"}
    sides |= {"transformers", "transformers, loop"} if COMPARED else set()
    assert report["frameworks"].keys() == sides
    assert report["frameworks"]["qwen2-jax"]["backend"] == "sorted"
    assert [result["measure"] for result in report["results"]] == ["forward", "forward and backward"]
    for result in report["results"]:
        assert result["medians"].keys() == sides and result["ratios"]["qwen2-jax"] == 1
    assert "| dense einsum |" in markdown.read_text()


@pytest.mark.slow
def test_training(tmp_path):
    markdown = page(tmp_path, "training")
    arguments = ["training", "--size", "tiny", "--dtype", "float32", "--repeats", "1", "--batch", "2", "--seq", "32"]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--markdown", str(markdown)]) == 0

    report = json.loads((tmp_path / "out.json").read_text())
    (result,) = report["results"]
    assert result["medians"].keys() == ({"qwen2-jax", "transformers"} if COMPARED else {"qwen2-jax"})
    assert (result["ratio"] is not None) == COMPARED
    assert result["losses"]["qwen2-jax"][-1] < result["losses"]["qwen2-jax"][0]
    assert result["flops_per_token"] > 6 * 2 * 512 * 64
    assert "| qwen2-jax |" in markdown.read_text()


@pytest.mark.slow
def test_harness(tmp_path):
    markdown = page(tmp_path, "harness")
    arguments = ["harness", "--size", "tiny", "--repeats", "1", "--scratch", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--markdown", str(markdown)]) == 0

    report = json.loads((tmp_path / "out.json").read_text())
    parts = ["multiple choice, letters", "multiple choice, endings", "cloze", "rolling windows"]
    assert [result["measure"] for result in report["results"]] == [*parts, "all log-likelihoods", "generation"]
    for result in report["results"]:
        assert result["seconds"].keys() == ({"qwen2-jax", "HFLM"} if COMPARED else {"qwen2-jax"})
        assert result["tokens"] > 0 and (result["ratio"] is not None) == COMPARED
    letters, *_ = report["results"]
    assert letters["computed"] < letters["tokens"] / 3  # examples once, four choices of one token each once
    assert report["same_texts"] == (1 if COMPARED else None)
    assert "| generation |" in markdown.read_text()


@pytest.mark.parametrize("gigabytes", [0.1, 2, 14])
def test_config_of(gigabytes):
    nbytes = 2 * sum(array.size for array in arrays_of(config_of(gigabytes * 1e9)).values())
    assert gigabytes * 1e9 <= nbytes < gigabytes * 1e9 + 100e6


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--size", "qwen2-1b"], "known are tiny, qwen2-0.5b"),
        (["--repeats", "0"], "at least 1, got 0"),
        (["--dtype", "int8"], "int8"),
        (["--json", "no-such-folder/out.json"], "there is no folder no-such-folder"),
        (["--scratch", "no-such-folder"], "there is no such folder"),
        (["--markdown", "README.md"], "must hold one block"),
        (["convert", "--gigabytes", "-1"], "must be positive"),
    ],
)
def test_bad_options(arguments, complaint, capsys):
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_a_process_that_dies_is_reported():
    worker = Worker("benchmarks.no_such_module")
    with pytest.raises(RuntimeError, match=r"(?s)asked to load:.*no_such_module"):
        worker.ask("load", folder="")
    worker.close()
    worker.close()
