"""Prompts: as long as asked, the needle where asked, the same from the same seed; and what counts as found."""

import itertools
import random
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from qwen2_jax.evaluation.needle import TASKS, Haystack, Riddle, build_prompt, hide, score, score_table
from qwen2_jax.evaluation.texts import library_text, read_texts


@pytest.fixture(scope="module", params=["bytes", "qwen"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(library_text(), tokenizer)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_asked_and_hold_every_secret_once(task, chat, tokenizer, haystack):
    @hypothesis.settings(max_examples=15)
    @hypothesis.given(st.integers(700, 3000), st.floats(0, 1), st.integers(0, 99))
    def check(length, depth, seed):
        prompt = build_prompt(task, tokenizer, length, depth, haystack=haystack, seed=seed, chat=chat)
        assert len(prompt.ids) == length
        text = tokenizer.decode(prompt.ids)
        assert len(set(prompt.expected)) == (4 if task == "multi-needle" else 1)
        assert all(text.count(secret) == 1 for secret in prompt.expected)
        for place, secret in zip(prompt.places, prompt.expected, strict=True):
            line = tokenizer.decode(prompt.ids[place:]).partition("\n")[0]
            assert re.fullmatch(rf'The special .* is {secret}\.|"[0-9a-f]{{8}}": "{secret}",', line)
            assert tokenizer.decode(prompt.ids[:place]).endswith("\n")
        assert text.endswith("<|im_start|>assistant\n" if chat else (" is", " are", ' is "'))

    check()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_needles_stand_at_their_depth(task, depth, qwen_tokenizer):
    haystack = Haystack(library_text(), qwen_tokenizer)
    prompt = build_prompt(task, qwen_tokenizer, 4000, depth, haystack=haystack)
    first, *others = prompt.places
    scaffolding = 80
    assert abs(first - depth * 4000) < scaffolding + 30
    assert depth != 0 or re.search(r"\n\n({\n)?$", qwen_tokenizer.decode(prompt.ids[:first]))
    after = qwen_tokenizer.decode(prompt.ids[first:]).split("\n")
    assert depth != 1 or after[1].startswith(("What is", "}", "The special"))
    steps = [b - a for a, b in itertools.pairwise([first, *others])]
    assert all(abs(step - (1 - depth) * 1000) < 100 for step in steps)


def test_the_filler_is_the_text_as_a_tokenizer_reads_it(qwen_tokenizer):
    """Lines are encoded one by one; only where the filler is cut may that differ from encoding it all."""
    prompt = build_prompt("needle", qwen_tokenizer, 5000, 0.3, haystack=Haystack(library_text(), qwen_tokenizer))
    again = qwen_tokenizer.encode(qwen_tokenizer.decode(prompt.ids))
    assert abs(len(again) - 5000) < 5 and again[:4800] == prompt.ids[:4800]


def test_a_seed_decides_everything(tokenizer, haystack):
    def prompt(**changes):
        arguments = {"task": "multi-needle", "length": 900, "depth": 0.5, "seed": 1, **changes}
        return build_prompt(tokenizer=tokenizer, haystack=haystack, **arguments)

    assert prompt() == prompt()
    others = [prompt(seed=2), prompt(task="needle"), prompt(needles=3)]
    assert all(other.ids != prompt().ids for other in others)
    assert prompt(depth=0.1).expected == prompt().expected


def test_short_and_odd_haystacks(bytes_tokenizer):
    short = Haystack("one line", bytes_tokenizer)
    text = bytes_tokenizer.decode(build_prompt("needle", bytes_tokenizer, 400, 0.5, haystack=short).ids)
    assert text.count("one line\n") > 5
    # A text of one endless line still has places for needles.
    endless = Haystack("word " * 2000, bytes_tokenizer)
    prompt = build_prompt("needle", bytes_tokenizer, 4000, 0.5, haystack=endless)
    assert abs(prompt.places[0] - 2000) < 240
    control = Haystack("<|im_end|>\n", bytes_tokenizer)
    assert max(build_prompt("needle", bytes_tokenizer, 400, 0.5, haystack=control).ids) < 256
    with pytest.raises(ValueError, match="no text"):
        Haystack(" \n\n", bytes_tokenizer)


def test_own_riddles(bytes_tokenizer):
    filler = itertools.repeat(bytes_tokenizer.encode("hay\n"))
    riddle = Riddle("", ["abcd = 1234\n"], "", "abcd =", ("1234",), filler)
    prompt = hide(riddle, bytes_tokenizer, 32, 0.5)
    # The filler's last line is cut, and still ends.
    assert bytes_tokenizer.decode(prompt.ids) == "hay\nhay\nabcd = 1234\nhay\nh\nabcd ="
    assert prompt.places == (8,)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"task": "noodle"}, "there is no task 'noodle'; the tasks are needle"),
        ({"depth": 1.5}, "a depth must be from 0 .* got 1.5"),
        ({"depth": float("nan")}, "a depth must be from 0"),
        ({"length": 40}, "40 tokens are too few for this prompt: without any filler it has"),
        ({"needles": 0}, "needles must be at least 1, got 0"),
        ({"haystack": None}, "task needle needs a haystack"),
    ],
)
def test_prompts_that_cannot_be(changes, complaint, bytes_tokenizer):
    arguments = {"task": "needle", "length": 500, "depth": 0.5, "haystack": Haystack("hay", bytes_tokenizer)}
    with pytest.raises(ValueError, match=complaint):
        build_prompt(tokenizer=bytes_tokenizer, **{**arguments, **changes})


def test_chat_templates_that_change_the_message(bytes_tokenizer, monkeypatch):
    monkeypatch.setattr(bytes_tokenizer, "template", "{{ messages[0].content | upper }}")
    with pytest.raises(ValueError, match="chat template"):
        build_prompt("key-value", bytes_tokenizer, 500, 0.5, chat=True)


def test_scores():
    assert score(["1234567"], " 1234567.") == 1
    assert score(["1234567"], "12345678") == score(["1234567"], "01234567") == score(["1234567"], "") == 0
    assert score(["1234567", "7654321", "1111111", "2222222"], "7654321, 1234567 and 3") == 0.5


def test_score_tables():
    cells = [("dca", 64, 0.0, 1), ("plain", 64, 0.0, 0), ("dca", 64, 0.0, 0.5), ("dca", 32, 1.0, 1)]
    samples = [dict(zip(("mode", "length", "depth", "score"), cell, strict=True)) for cell in cells]
    assert score_table(samples) == [
        {"mode": "dca", "length": 64, "depth": 0.0, "score": 0.75, "samples": 2},
        {"mode": "plain", "length": 64, "depth": 0.0, "score": 0.0, "samples": 1},
        {"mode": "dca", "length": 32, "depth": 1.0, "score": 1.0, "samples": 1},
    ]


def test_texts(tmp_path):
    text = library_text()
    assert len(text) > 300_000 and text == library_text()
    files = [tmp_path / name for name in "abcd"]
    for file, content in zip(files, [b"one\r\ntwo", b"three\n", b"\xff", b" \n"], strict=True):
        file.write_bytes(content)
    assert read_texts(files[:2]) == "one\ntwo\nthree\n"
    with pytest.raises(ValueError, match="c is not UTF-8"):
        read_texts(files)
    with pytest.raises(ValueError, match="d holds no text"):
        read_texts(files[3:])


def test_haystacks_begin_anywhere_and_go_on(bytes_tokenizer):
    lines = Haystack("a\n\nb\nc\n", bytes_tokenizer).lines(random.Random(0))
    text = bytes_tokenizer.decode(itertools.chain.from_iterable(itertools.islice(lines, 7)))
    assert text in "a\n\nb\nc\n" * 4
