"""Every prompt is in one batch, after its own beginning, and nothing is shared that does not save enough."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.evaluation.completion_plan import Shape, plan_completions

ROOM = dict(cached=4096, shapes=3, step=16)
tokens = st.lists(st.integers(1, 3), min_size=1, max_size=12)


@st.composite
def requests(draw):
    """Prompts that begin alike at several depths, with answers of several lengths."""
    stems = [[draw(st.integers(1, 3))] * length for length in (0, 20, 40, 200)]
    prompts = st.builds(lambda stem, rest: [*stem, *rest], st.sampled_from(stems), tokens)
    return draw(st.lists(st.tuples(prompts, st.sampled_from([1, 8, 100])), min_size=1, max_size=20))


@given(
    prompts=requests(),
    share=st.booleans(),
    multiple=st.sampled_from([1, 4]),
    max_rows=st.sampled_from([None, 1, 6, 8]),
    shapes=st.sampled_from([1, 3]),
)
def test_every_prompt_is_continued_once(prompts, share, multiple, max_rows, shapes):
    room = {**ROOM, "shapes": shapes}
    plan = plan_completions(prompts, **room, share=share, multiple=multiple, max_rows=max_rows)
    found = []
    for batch in plan.batches:
        shape, sizes = batch.shape, plan.sizes[batch.shape]
        held = sizes.rows * (sum(shape[:3]) + shape.prefix)
        assert 0 < len(batch.rows) <= sizes.rows <= max(multiple, max_rows or 64 * multiple)
        assert held <= room["cached"] or sizes.rows == multiple
        assert sizes.rows % multiple == 0 and sizes.prefixes % multiple == 0
        prefixes = {}
        for row in batch.rows:
            prompt, answer = prompts[row.prompt]
            assert prefixes.setdefault(row.group, prompt[: row.shared]) == prompt[: row.shared]
            assert row.shared <= shape.prefix and 0 < len(prompt) - row.shared <= shape.suffix
            assert answer <= shape.answer
            assert (row.shared > 0) == (row.group >= 0) == (shape.prefix > 0)
            found.append(row.prompt)
        assert (len(prefixes) if shape.prefix else 0) <= sizes.prefixes
    assert sorted(found) == list(range(len(prompts)))
    assert len(plan.sizes) <= shapes
    if not share:
        assert all(shape.prefix == 0 for shape in plan.sizes)


@given(prompts=requests())
def test_sharing_never_costs_more(prompts):
    apart = plan_completions(prompts, **ROOM, share=False)
    together = plan_completions(prompts, **ROOM)
    assert together == apart or together.cost(16) <= apart.cost(16) - 0.2 * apart.slots


def test_examples_are_read_once_in_each_batch():
    examples = list(range(500))
    prompts = [([*examples, *[1000 + index] * (20 + index % 10)], 64) for index in range(100)]
    plan = plan_completions(prompts, **{**ROOM, "cached": 10**6})
    assert plan.sizes == {Shape(512, 32, 64, 2): (1, 50)}
    assert plan.slots == 2 * (512 + 50 * 32)


def test_little_in_common_is_not_shared():
    """Attention behind a prefix takes slower paths: a template's few words are not worth them."""
    prompts = [([*range(20), *[1000 + index] * 300], 64) for index in range(50)]
    assert [shape.prefix for shape in plan_completions(prompts, **ROOM).sizes] == [0]


def test_equal_prompts_have_each_their_answer():
    plan = plan_completions([(list(range(100)), 8)] * 3, **ROOM)
    assert [[row.shared for row in batch.rows] for batch in plan.batches] == [[99, 99, 99]]


def test_few_rows_join_where_a_step_costs_more_than_padding():
    prompts = [([index] * length, 64) for index, length in enumerate((30, 30, 90, 90))]
    shapes = {step: set(plan_completions(prompts, **{**ROOM, "step": step}).sizes) for step in (1, 256)}
    assert shapes == {1: {Shape(0, 32, 64, 0), Shape(0, 96, 64, 0)}, 256: {Shape(0, 96, 64, 0)}}


def test_every_group_is_charged_for_its_own_prefix():
    """As of passages with a few questions each: they are shared, and shapes follow the passages' lengths."""
    lengths = np.random.default_rng(0).integers(200, 2000, 200)
    prompts = [([*[group] * length, *[9000 + i] * 30], 64) for group, length in enumerate(lengths) for i in range(4)]
    plan = plan_completions(prompts, cached=500_000, shapes=3, step=256)
    ideal = lengths.sum() + 30 * len(prompts)
    assert ideal <= plan.slots <= 2 * ideal
    assert len({shape.prefix for shape in plan.sizes}) == 3


def test_examples_of_all_are_not_read_as_often_as_the_pairs_of_others():
    examples = list(range(1000))
    prompts = [([*examples, *[2000 + index] * 150], 256) for index in range(650)]
    prompts += [([*[3000 + pair] * 500, *[9000 + i] * 150], 256) for pair in range(75) for i in range(2)]
    plan = plan_completions(prompts, cached=500_000, shapes=3, step=256)
    ideal = 1000 + 650 * 150 + 75 * 500 + 150 * 150
    assert plan.slots <= 2 * ideal


def test_batches_keep_to_the_room():
    """A row's prefix is there twice: where it was read, and in the row."""
    prompts = [([*range(400), index], 28) for index in range(30)]
    for share, most in ((True, 3000 // (2 * 448 + 16 + 32)), (False, 3000 // (448 + 32))):
        plan = plan_completions(prompts, **{**ROOM, "cached": 3000}, share=share)
        assert [len(batch.rows) for batch in plan.batches] == [most] * (30 // most)
        assert all((shape.prefix > 0) == share for shape in plan.sizes)
