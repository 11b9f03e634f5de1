"""Every request is asked for once, of tokens that are its own, and sharing saves what it can."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.evaluation.score_plan import plan_scores
from qwen2_jax.generation import bucket

ROOM = dict(slots=512, cached=4096, programs=4)
tokens = st.lists(st.integers(1, 3), min_size=1, max_size=12)


@st.composite
def requests(draw):
    """Contexts that begin alike at several depths, one of them long enough to share."""
    stems = [[draw(st.integers(1, 3))] * length for length in (0, 20, 40)]
    contexts = st.builds(lambda stem, rest: [*stem, *rest], st.sampled_from(stems), tokens)
    return draw(st.lists(st.tuples(contexts, tokens), min_size=1, max_size=20))


@given(pairs=requests(), share=st.booleans(), multiple=st.sampled_from([1, 4]))
def test_every_token_is_asked_for_once_after_its_own_context(pairs, share, multiple):
    plan = plan_scores(pairs, **ROOM, share=share, multiple=multiple)
    found = {index: {} for index in range(len(pairs))}
    for batch in plan.batches:
        sizes = plan.sizes[batch.shape]
        assert len(batch.rows) <= sizes.rows and len({row.group for row in batch.rows}) <= sizes.prefixes
        assert sum(len(row.asks) for row in batch.rows) <= sizes.asks
        assert sizes.rows % multiple == 0 and sizes.prefixes % multiple == 0
        for row in batch.rows:
            assert row.shared <= batch.shape.prefix and 0 < len(row.tokens) - row.shared <= batch.shape.suffix
            for ask in row.asks:
                assert ask.position >= row.shared
                found[ask.request][ask.position] = ([*row.tokens[: ask.position + 1].tolist()], ask.token)
    for (context, continuation), asked in zip(pairs, found.values(), strict=True):
        whole = [*context, *continuation]
        places = range(len(context) - 1, len(whole) - 1)
        assert asked == {place: (whole[: place + 1], whole[place + 1]) for place in places}
    assert len(plan.sizes) <= ROOM["programs"]
    assert 0 < plan.tokens <= plan.slots
    if not share:
        assert all(row.shared == 0 for batch in plan.batches for row in batch.rows)


@given(pairs=requests())
def test_rows_of_a_group_have_the_same_prefix(pairs):
    prefixes = {}
    for batch in plan_scores(pairs, **ROOM).batches:
        for row in batch.rows:
            prefix = row.tokens[: row.shared].tolist()
            assert prefixes.setdefault(row.group, prefix) == prefix


@given(pairs=requests())
def test_sharing_never_computes_more(pairs):
    room = dict(slots=10**6, cached=10**6, programs=100)
    assert plan_scores(pairs, **room).tokens <= plan_scores(pairs, **room, share=False).tokens


def test_choices_of_one_token_are_one_row():
    question = list(range(30))
    plan = plan_scores([(question, [token]) for token in (50, 51, 52, 53)], **ROOM)
    (batch,) = plan.batches
    (row,) = batch.rows
    assert [(ask.request, ask.position, ask.token) for ask in row.asks] == [(i, 29, 50 + i) for i in range(4)]
    assert plan.tokens == 30


def test_answers_share_their_question():
    question = list(range(40))
    plan = plan_scores([(question, [100 + i, 7, 8, 9]) for i in range(4)], **ROOM)
    # The question less its last token, which predicts each answer's first; then that token and three of the answer.
    assert plan.tokens == 39 + 4 * 4


def test_questions_share_their_examples():
    examples = list(range(200))
    questions = [[1000 + i] * 20 for i in range(30)]
    pairs = [([*examples, *question], [token]) for question in questions for token in (5, 6)]
    plan = plan_scores(pairs, slots=10**6, cached=10**6, programs=4)
    assert plan.tokens == 200 + 30 * 20


def test_the_deeper_sharing_wins_where_it_saves_more():
    """Two contexts that share little, with many long answers each, are two groups."""
    pairs = [([*range(20), base, *range(500)], [600 + i] * 30) for base in (900, 901) for i in range(4)]
    plan = plan_scores(pairs, slots=10**6, cached=10**6, programs=4)
    assert plan.tokens == 2 * (520 + 4 * 30)


def test_batches_keep_to_the_room():
    generator = random.Random(0)
    pairs = [([generator.randrange(9) for _ in range(generator.randrange(1, 200))], [1, 2]) for _ in range(300)]
    plan = plan_scores(pairs, slots=1000, cached=1000, programs=3)
    for batch in plan.batches:
        assert len(batch.rows) * batch.shape.suffix <= 1000
    assert max(len(batch.rows) for batch in plan_scores(pairs, **ROOM, max_rows=3).batches) <= 3


def least_slots(lengths, shapes):
    """Of rows of these lengths in so many shapes: every way to cut the sorted lengths, by dynamic programming."""
    widths = sorted(Counter(map(bucket, lengths)).items())
    least = [[0] + [math.inf] * len(widths)]
    for _ in range(shapes):
        least.append([0])
        for end in range(1, len(widths) + 1):
            rows = itertools.accumulate(count for _, count in reversed(widths[:end]))
            before = reversed(least[-2][:end])
            least[-1].append(min(cost + count * widths[end - 1][0] for cost, count in zip(before, rows, strict=True)))
    return least[-1][-1]


def test_few_shapes_cost_little_padding():
    lengths = sorted(set(np.random.default_rng(0).integers(10, 1000, 2000).tolist()))
    pairs = [([0] * length, [1]) for length in lengths]
    plan = plan_scores(pairs, slots=16384, cached=1, programs=6, share=False)
    assert len(plan.sizes) <= 6 and plan.tokens == sum(lengths)
    in_shapes = sum(len(batch.rows) * batch.shape.suffix for batch in plan.batches)
    assert least_slots(lengths, 6) <= in_shapes <= 1.01 * least_slots(lengths, 6)
    assert plan.slots <= 1.03 * in_shapes  # every batch of a shape has as many rows as the largest


@pytest.mark.parametrize("pairs", [[([1], [2])], [([1, 2], [3]), ([1, 2], [3])], [([1], [2, 3]), ([1, 2], [3])]])
def test_the_smallest(pairs):
    plan = plan_scores(pairs, **ROOM)
    assert sum(len(row.asks) for batch in plan.batches for row in batch.rows) == sum(len(c) for _, c in pairs)
