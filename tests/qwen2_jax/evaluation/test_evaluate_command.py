"""`qwen2-jax evaluate` as a user meets it: folders, tables, going on after a kill, and one line for every mistake."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import qwen2_jax.evaluation.perplexity
import qwen2_jax.generation
from convert import load_checkpoint
from qwen2_jax import Qwen2
from qwen2_jax.evaluation.texts import library_text
from qwen2_jax.tokenizer import Tokenizer

MODES = "plain,yarn,dca"


@pytest.fixture
def needle(model, tmp_path):
    return [
        "needle",
        "--model",
        model,
        "--out",
        tmp_path / "out",
        "--lengths",
        400,
        "--depths",
        0,
        1,
        "--batch-size",
        4,
    ]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(library_text()[:2000])
    return path


@pytest.fixture
def perplexity(model, text, tmp_path):
    flags = ["--length", 200, "--windows", 2, "--batch-size", 2, "--prefill-chunk", 64]
    return ["perplexity", "--model", model, "--text", text, "--out", tmp_path / "out", *flags]


@pytest.fixture
def finder(bytes_tokenizer, monkeypatch):
    """In place of the model, one that finds a needle unless it is plain and reads more than 500 tokens. Its list holds
    how many prompts it was asked at once."""
    asked: list[int] = []

    def generate(config, params, tokens, *, max_new_tokens, **_):
        asked.append(len(tokens))
        rows = np.zeros((len(tokens), max_new_tokens), np.int32)
        for row, ids in zip(rows, tokens, strict=True):
            found = re.findall(r"is (\d{7})\.", bytes_tokenizer.decode(ids))
            if config.dual_chunk or len(ids) <= 500:
                answer = bytes_tokenizer.encode(f" {' and '.join(found)}."[:max_new_tokens])
                row[: len(answer)] = answer
        return rows

    monkeypatch.setattr(qwen2_jax.generation, "generate", generate)
    return asked


@pytest.mark.parametrize("argv", [[], ["needle", "--help"], ["perplexity", "--help"]])
def test_help_does_not_wait_for_jax(argv):
    script = "import sys; from qwen2_jax.cli import main\ntry: main()\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "evaluate", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_needle(run, needle, tmp_path):
    options = ["--mode", MODES, "--chunk-size", 96, "--prefill-chunk", 128, "--max-new-tokens", 8]
    code, out, err = run(*needle, *options)
    assert code == 0 and "share of secrets found" in out and out.endswith("needle.png\n")
    assert "prompts: 6 of 6 (dca, 400 tokens)" in err
    report = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert [row["mode"] for row in report["table"]] == ["plain", "plain", "yarn", "yarn", "dca", "dca"]
    assert report["trained_length"] == 128 and report["versions"]["jax"]
    assert [entry["yarn"] and entry["yarn"]["factor"] for entry in report["configurations"]] == [None, 4.0, None]
    assert report["configurations"][2]["dual_chunk"]["chunk_size"] == 96
    assert all(sample["prompt_tokens"] == 400 and sample["score"] == 0 for sample in report["samples"])
    assert {"expected", "answer", "places", "depth"} <= report["samples"][0].keys()
    assert (tmp_path / "out" / "needle.png").read_bytes().startswith(b"\x89PNG")
    # A second run has nothing to do; what it reports is the same.
    assert run(*needle, *options)[0::2] == (0, "")
    assert json.loads((tmp_path / "out" / "needle.json").read_text()) == report


@pytest.mark.parametrize("task", ["multi-needle", "key-value"])
def test_needle_tasks_and_chat(task, run, needle, tmp_path):
    code, out, err = run(*needle, "--task", task, "--lengths", 700, "--chat", "--max-new-tokens", 4, "--json")
    assert (code, err) == (0, "")
    assert [row["length"] for row in json.loads(out)["table"]] == [700, 700]
    samples = json.loads((tmp_path / "out" / "needle.json").read_text())["samples"]
    assert all(len(sample["expected"]) == (4 if task == "multi-needle" else 1) for sample in samples)


def test_needle_scores_and_goes_on(run, needle, finder, tmp_path):
    command = [*needle, "--mode", "plain,dca", "--lengths", 600, 400, "--samples", 3, "--json"]
    table = json.loads(run(*command)[1])["table"]
    assert [(row["mode"], row["length"], row["score"]) for row in table[::2]] == [
        *(("plain", 400, 1.0), ("plain", 600, 0.0), ("dca", 400, 1.0), ("dca", 600, 1.0)),
    ]
    assert finder == [4, 2] * 4
    report = (tmp_path / "out" / "needle.json").read_bytes()
    journal = tmp_path / "out" / "needle.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: 1 + 9]) + lines[10][:40])  # killed while it wrote the tenth sample
    finder.clear()
    # Neither the batch nor the order of the lengths is a setting.
    again = run(*command, "--batch-size", 2, "--lengths", 400, 600)
    assert json.loads(again[1])["table"] == table and sum(finder) == 24 - 9
    assert (tmp_path / "out" / "needle.json").read_bytes() == report


def test_multi_needle_scores_shares(run, needle, finder):
    flags = ["--task", "multi-needle", "--needles", 4, "--lengths", 500, "--max-new-tokens", 18, "--json"]
    table = json.loads(run(*needle, *flags)[1])["table"]
    assert [row["score"] for row in table] == [0.25, 0.25]  # the answer ends before the second


def test_other_settings_need_another_folder(run, refused, needle, finder, model, tmp_path):
    assert run(*needle)[0] == 0
    refused(*needle, "--seed", 1, because="seed: 0, now 1")
    refused(*needle, "--task", "key-value", because='task: "needle", now "key-value"')
    assert run(*needle, "--seed", 1, "--overwrite")[0] == 0


def test_more_of_the_same_keeps_what_is_there(run, needle, finder, tmp_path):
    out = tmp_path / "out"
    assert run(*needle)[0] == 0
    before = (out / "needle.jsonl").read_text().splitlines()
    assert run(*needle, "--samples", 2, "--mode", "checkpoint,yarn")[0] == 0
    after = (out / "needle.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) - 1 == 4 * (len(before) - 1)
    assert len(json.loads((out / "needle.json").read_text())["samples"]) == len(after) - 1
    assert run(*needle)[0] == 0  # and less of it: only what is asked for is shown
    assert len(json.loads((out / "needle.json").read_text())["samples"]) == len(before) - 1


def test_needle_mistakes(refused, needle, tmp_path, text):
    refused("needle", because="--lengths")
    refused(*needle, "--lengths", 0, because="--lengths must be at least 1, got 0")
    refused(*needle, "--lengths", because="--lengths")
    refused(*needle, "--lengths", 20, 400, because="20 tokens are too few for this prompt")
    refused(*needle, "--depths", 0.5, 1.5, because="--depths must be from 0")
    refused(*needle, "--depths", because="--depths needs at least one number")
    refused(*needle, "--samples", 0, because="--samples must be at least 1, got 0")
    refused(*needle, "--batch-size", 0, because="--batch-size must be at least 1, got 0")
    refused(*needle, "--prefill-chunk", 0, because="--prefill-chunk must be at least 1, got 0")
    refused(*needle, "--max-new-tokens", 0, because="--max-new-tokens must be at least 1, got 0")
    refused(*needle, "--mode", "plain,ntk", because="there is no mode 'ntk'")
    refused(*needle, "--mode", "plain", "--chunk-size", 64, because="mode plain does not read chunk_size")
    refused(*needle, "--mode", "dca", "--chunk-size", 64, "--local-size", 64, because="local_size (64) must be smaller")
    refused(*needle, "--mode", "yarn", "--trained-length", 4, because="more than 32 times the trained length")
    refused(*needle, "--task", "noodle", because="noodle")
    refused(*needle, "--needles", 2, because="--needles means nothing in task needle")
    refused(*needle, "--task", "multi-needle", "--needles", 0, because="--needles must be at least 1")
    refused(*needle, "--task", "key-value", "--haystack", text, because="--haystack means nothing in task key-value")
    refused(*needle, "--haystack", tmp_path / "nothing", because="nothing: No such file")
    refused(*needle, "--model", tmp_path / "nowhere", because="nowhere")
    text.write_bytes(b"\xff")
    refused(*needle, "--haystack", text, because="text.txt is not UTF-8")
    text.write_bytes(b"")
    refused(*needle, "--haystack", text, because="text.txt holds no text")
    assert not (tmp_path / "out").exists()
    refused(*needle, "--out", text, because="text.txt: File exists")
    refused(*needle, "--out", text / "below", because="Not a directory")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "needle.jsonl").mkdir()
    refused(*needle, because="needle.jsonl: Is a directory")


def test_perplexity(run, perplexity, tmp_path):
    code, out, err = run(*perplexity, "--mode", MODES, "--bucket", 50)
    assert code == 0 and "151-199" in out and out.endswith("perplexity.png\n")
    assert "windows: 6 of 6 (dca)" in err
    report = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert len(report["table"]) == 3 * 4 and len(report["windows"]) == 3 * 2
    assert report["settings"]["bucket"] == 50 and report["trained_length"] == 128
    of_mode = {mode: [row["loss"] for row in report["table"] if row["mode"] == mode] for mode in MODES.split(",")}
    # Within the first chunk Dual Chunk Attention is plain attention; YaRN never is.
    np.testing.assert_allclose(of_mode["plain"][:2], of_mode["dca"][:2], rtol=1e-5)
    assert abs(of_mode["plain"][3] - of_mode["dca"][3]) > 1e-4 < abs(of_mode["plain"][0] - of_mode["yarn"][0])
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")

    journal = tmp_path / "out" / "perplexity.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    code, out, err = run(*perplexity, "--mode", MODES, "--bucket", 50, "--json")
    assert (code, err) == (0, "")
    for row, before in zip(json.loads(out)["table"], report["table"], strict=True):
        assert row["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_the_whole_text_by_sliding_windows(run, perplexity, text, model, tmp_path):
    """Every token is predicted once, from a window's tokens before it, and bits are of the text's own bytes."""
    text.write_text("Überall ist es schön, 世界. " * 4)
    flags = [*perplexity[: perplexity.index("--windows")], "--length", 40, "--stride", 24, "--mode", "plain,dca"]
    code, out, err = run(*flags)
    assert code == 0 and "by place in the text" in out and "bits per byte" in out, err
    report = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    config, params = load_checkpoint(model)
    ids = Tokenizer.from_folder(model).encode(f"{text.read_text()}\n", control_tokens=False)
    apply = jax.jit(lambda tokens: jax.nn.log_softmax(Qwen2(config).apply({"params": params}, tokens).logits[0]))
    nats, end = 0.0, 40
    for place in range(1, len(ids)):
        end = end if place < end else min(end + 24, len(ids))
        nats -= float(apply(np.asarray([ids[end - 40 : end]]))[place - 1 - (end - 40), ids[place]])
    plain, dca = report["totals"]
    assert (plain["tokens"], plain["bytes"]) == (len(ids) - 1, len(ids) - 1)
    assert plain["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert plain["bits_per_byte"] == pytest.approx(nats / np.log(2) / (len(ids) - 1), rel=1e-5)
    assert dca["mode"] == "dca" and dca["loss"] == pytest.approx(plain["loss"], rel=1e-5)  # within one chunk
    assert report["table"][0]["first"] == 1 and report["table"][-1]["last"] == len(ids) - 1
    code, out, _ = run(*flags, "--json")
    assert code == 0 and json.loads(out)["totals"] == report["totals"]


def test_a_loss_that_is_no_number(refused, perplexity, monkeypatch):
    losses = np.full((2, 199), np.nan, np.float32)
    monkeypatch.setattr(qwen2_jax.evaluation.perplexity, "loss_by_position", lambda *_, **__: losses)
    refused(*perplexity, because="not a number in mode checkpoint, windows [0, 1]")


def test_perplexity_mistakes(run, refused, perplexity, text, tmp_path):
    refused("perplexity", because="--text")
    refused(*perplexity, "--length", 1, because="--length must be at least 2, got 1")
    refused(*perplexity, "--windows", 0, because="--windows must be at least 1, got 0")
    refused(*perplexity, "--bucket", 0, because="--bucket must be from 1 to 199")
    refused(*perplexity, "--bucket", 200, because="less than the length, got 200")
    refused(*perplexity, "--prefill-chunk", 0, because="--prefill-chunk must be at least 1, got 0")
    refused(*perplexity, "--windows", 50, because="50 windows of 200 need 10000")
    refused(*perplexity, "--stride", 64, because="--windows means nothing with --stride")
    refused(*perplexity, "--stride", 200, because="--stride must be from 1 to 199, less than the length, got 200")
    refused(*perplexity, "--mode", "long", because="there is no mode 'long'")
    refused(*perplexity, "--text", because="--text names no file")
    refused(*perplexity, "--text", tmp_path / "nothing", because="nothing: No such file")
    refused(*perplexity, "--out", text, because="text.txt: File exists")
    text.write_bytes(b"a\xffb")
    refused(*perplexity, because="text.txt is not UTF-8")
    text.write_bytes(b"\n")
    refused(*perplexity, because="text.txt holds no text")
    assert not (tmp_path / "out").exists()
