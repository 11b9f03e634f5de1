"""Answers of the completer against `generate`, one prompt at a time, cut afterwards."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen2_jax import generate
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.evaluation import completion
from qwen2_jax.evaluation.completion import Completer, Prompt, cut_at_stops
from qwen2_jax.evaluation.memory import Room
from qwen2_jax.sampling import Sampling
from sharding import make_mesh, param_shardings, run_options

NEW = 24


@pytest.fixture(scope="module")
def prompts(bytes_tokenizer):
    return [bytes_tokenizer.encode(text) for text in ("the quick brown fox", "tea", "over a lazy dog it jumps")]


@pytest.fixture(scope="module")
def eos_ids(bytes_tokenizer):
    return (bytes_tokenizer.control_id("<|endoftext|>"),)


@pytest.fixture(scope="module")
def complete(config, params, bytes_tokenizer, eos_ids):
    """Texts in order, and what that took."""

    def complete(prompts, **options):
        options = {"params": params, "room": Room(4096, 4096), "eos_ids": eos_ids, **options}
        completer = Completer(config, options.pop("params"), bytes_tokenizer, **options)
        texts = dict(completer.texts(prompts))
        return [texts[index] for index in range(len(prompts))], completer.work

    return complete


@pytest.fixture(scope="module")
def reference(config, params, bytes_tokenizer, eos_ids):
    def reference(tokens, new=NEW, **sampling):
        ids = generate(config, params, [tokens], max_new_tokens=new, eos_ids=eos_ids, **sampling)[0].tolist()
        ids = ids[: ids.index(eos_ids[0])] if eos_ids[0] in ids else ids
        return bytes_tokenizer.decode(ids, control_tokens=False)

    return reference


@pytest.fixture(scope="module")
def on_mesh(config, params):
    """Options of a completer on eight devices."""
    mesh = make_mesh("data=4,tensor=2")
    return {
        "params": jax.device_put(params, param_shardings(config, mesh)),
        "options": run_options(config, mesh, rules="serve"),
        "multiple": 4,
    }


def test_stop_strings_are_found_wherever_a_step_ends(complete, reference, prompts, monkeypatch):
    monkeypatch.setattr(completion, "_STEP", 4)
    text = reference(prompts[0])
    stops = [text[start : start + 3] for start in range(1, 12)]
    answers, work = complete([Prompt(prompts[0], NEW, (stop,)) for stop in stops])
    assert answers == [text.split(stop, 1)[0] for stop in stops]
    assert len(set(answers)) > 5 and work.unstopped == 0
    assert work.new_tokens < len(stops) * NEW  # none goes on to its end


def test_the_first_of_several_stop_strings_ends_an_answer(complete, reference, prompts):
    text = reference(prompts[0])
    late, early = text[9:11], text[4:6]
    answers, _ = complete([Prompt(prompts[0], NEW, (late, "", early, "never"))])
    assert answers == [cut_at_stops(text, (late, early))] == [min(text.split(late)[0], text.split(early)[0], key=len)]


def test_stop_strings_that_never_come_are_counted(complete, reference, prompts):
    answers, work = complete([Prompt(tokens, NEW, ("never",)) for tokens in prompts])
    assert answers == [reference(tokens) for tokens in prompts]
    assert work.unstopped == 3 and work.new_tokens == 3 * NEW


def test_the_end_of_text_is_a_stop(complete, config, params, prompts, bytes_tokenizer):
    ids = generate(config, params, [prompts[0]], max_new_tokens=NEW)[0].tolist()
    first = ids.index(ids[7])
    answers, work = complete([Prompt(prompts[0], NEW)], eos_ids=(ids[7],))
    assert answers == [bytes_tokenizer.decode(ids[: first + 1], control_tokens=False)]
    assert work.unstopped == 0 and work.new_tokens == first + 1


def test_rows_have_limits_of_their_own(complete, reference, prompts):
    limits = (3, 20, 9)
    answers, work = complete([Prompt(tokens, limit) for tokens, limit in zip(prompts, limits, strict=True)])
    assert answers == [reference(tokens, limit) for tokens, limit in zip(prompts, limits, strict=True)]
    assert work.new_tokens == sum(limits) and work.tokens == sum(map(len, prompts))


def test_batches_of_one_row(complete, reference, prompts):
    answers, work = complete([Prompt(tokens, NEW) for tokens in prompts], max_rows=1)
    assert answers == [reference(tokens) for tokens in prompts]
    assert {sizes.rows for _, sizes, *_ in work.programs} == {1}


def test_prompts_in_pieces(complete, reference, prompts):
    answers, work = complete([Prompt(tokens * 4, NEW) for tokens in prompts], room=Room(64, 4096))
    assert answers == [reference(tokens * 4) for tokens in prompts]
    assert any(chunk for *_, chunk in work.programs)


def test_repetition_penalty(complete, reference, prompts):
    answers, _ = complete([Prompt(tokens, NEW) for tokens in prompts], sampling=Sampling(repetition_penalty=1.4))
    assert answers == [reference(tokens, repetition_penalty=1.4) for tokens in prompts]
    assert answers != [reference(tokens) for tokens in prompts]


def test_sampling_is_that_of_generate(complete, config, params, prompts, bytes_tokenizer, eos_ids):
    how = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    longest_first = sorted(prompts, key=len, reverse=True)
    width = len(longest_first[0])
    tokens = np.asarray([[*row, *[0] * (width - len(row))] for row in longest_first])
    lengths = [len(row) for row in longest_first]
    ids = generate(config, params, tokens, lengths, max_new_tokens=NEW, eos_ids=eos_ids, seed=5, **how).tolist()
    expected = [row[: row.index(eos_ids[0])] if eos_ids[0] in row else row for row in ids]
    wanted = [Prompt(row, NEW) for row in longest_first]
    answers, _ = complete(wanted, sampling=Sampling(**how), seed=5, shapes=1)
    assert answers == [bytes_tokenizer.decode(row, control_tokens=False) for row in expected]
    assert answers == complete(wanted, sampling=Sampling(**how), seed=5, shapes=1)[0]
    assert answers != complete(wanted, sampling=Sampling(**how), seed=6, shapes=1)[0]


def test_rows_on_a_mesh(complete, on_mesh, prompts):
    wanted = [Prompt(tokens, NEW, ("a", "e")) for tokens in prompts]
    answers, work = complete(wanted, **on_mesh)
    assert answers == complete(wanted)[0]
    assert {sizes.rows for _, sizes, *_ in work.programs} == {4}


@pytest.mark.parametrize("room", [Room(4096, 4096), Room(64, 4096)])
def test_what_prompts_begin_with_is_read_once(complete, prompts, room):
    examples = prompts[2] * 2
    wanted = [Prompt([*examples, index, *prompts[index % 2]], NEW, ("a",)) for index in range(6)]
    answers, work = complete(wanted, room=room)
    apart, all_of_it = complete(wanted, room=room, share=False)
    assert answers == apart
    assert all_of_it.tokens == sum(len(prompt.tokens) for prompt in wanted)
    assert work.tokens == all_of_it.tokens - 5 * len(examples) and work.slots < all_of_it.slots
    assert any(chunk for *_, chunk in work.programs) == (room.slots == 64)


def test_several_beginnings_in_a_batch_on_a_mesh(complete, on_mesh, prompts):
    beginnings = [prompts[2] * 2, prompts[0] * 3]
    wanted = [Prompt([*beginnings[index % 2], 1 + index, *prompts[1]], NEW, ("a",)) for index in range(7)]
    answers, work = complete(wanted, **on_mesh)
    assert answers == complete(wanted, share=False)[0] == complete(wanted)[0]
    (programs,) = work.programs
    assert programs.sizes == (4, 8)  # two beginnings, seven rows
    assert work.tokens == sum(map(len, beginnings)) + 7 * (1 + len(prompts[1]))


def test_a_temperature_of_whole_prompts_shares_nothing(config, params, bytes_tokenizer, eos_ids):
    config = dataclasses.replace(config, dual_chunk=DualChunk(64, 16, 32, temperature="prompt"))
    completer = Completer(config, params, bytes_tokenizer, eos_ids=eos_ids, room=Room(4096, 4096))
    texts = dict(completer.texts([Prompt([*range(40), last], 2) for last in range(6)]))
    assert len(texts) == 6 and completer.work.tokens == 6 * 41
