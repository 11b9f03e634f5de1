"""Long inputs through whole models: one pass, pieces and single tokens agree; the options of a run are honoured."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import Generation, Qwen2, Qwen2Config, generate
from qwen2_jax.cache import empty_cache
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.layers import Options
from qwen2_jax.long_context import MODES, LongContext
from qwen2_jax.model import init_params, stack_layers
from qwen2_jax.sizes import PUBLISHED
from qwen2_jax.yarn import Yarn
from tests.qwen2_jax.shapes import MOE, SMALL

LONG = dict(SMALL, max_position_embeddings=16, rope_theta=100.0)
DUAL_CHUNK = DualChunk(chunk_size=16, local_size=3, original_max_position_embeddings=16)  # chunks of 13
CONFIGS = {
    "dense": Qwen2Config(**LONG, dual_chunk=DUAL_CHUNK),
    "mixed": Qwen2Config(**{**LONG, "num_hidden_layers": 4}, **MOE, decoder_sparse_step=2, dual_chunk=DUAL_CHUNK),
    "with yarn": Qwen2Config(**LONG, dual_chunk=DUAL_CHUNK, yarn=Yarn(4.0, 16)),
    "temperature of the prompt": Qwen2Config(**LONG, dual_chunk=dataclasses.replace(DUAL_CHUNK, temperature="prompt")),
}
LENGTH = 60  # more than four chunks


@partial(jax.jit, static_argnames=("config", "options", "remat"))
def apply(config, params, tokens, options=Options(), remat="none", **arguments):
    return Qwen2(config, options=options, remat=remat).apply({"params": params}, tokens, **arguments)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH), dtype=np.int32)


def logits_in_pieces(config, params, tokens, segments, pieces, stacked=False):
    cache, parts = empty_cache(config, 2, LENGTH + 4, jnp.float32, stacked), []
    lengths = np.full_like(tokens, LENGTH)  # what a prompt's temperature needs to know from the first piece on
    for start, size in zip(np.cumsum([0, *pieces[:-1]]), pieces, strict=True):
        place = slice(start, start + size)
        out = apply(
            config, params, tokens[:, place], segment_ids=segments[:, place], cache=cache, lengths=lengths[:, place]
        )
        cache, _ = out.cache, parts.append(out.logits)
    return np.concatenate(parts, axis=1)


def random_pieces(seed, size):
    borders = np.sort(np.random.default_rng(seed).choice(np.arange(1, LENGTH), size - 1, replace=False))
    return np.diff([0, *borders, LENGTH]).tolist()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "pieces",
    [
        [1] * LENGTH,
        random_pieces(1, 5),
        *(pytest.param(pieces, marks=pytest.mark.slow) for pieces in ([13, 13, 13, 13, 8], random_pieces(2, 9))),
    ],
)
def test_decode_equals_prefill(config, params, tokens, pieces, stacked):
    whole = apply(config, params, tokens).logits
    params = stack_layers(params, config) if stacked else params
    got = logits_in_pieces(config, params, tokens, np.ones_like(tokens), pieces, stacked)
    np.testing.assert_allclose(got, whole, atol=1e-4)


def test_left_padding_does_not_move_the_chunks(config, params, tokens):
    segments = np.ones_like(tokens)
    segments[1, :7] = 0
    got = logits_in_pieces(config, params, tokens, segments, [20, 1, 1, 30, 8])
    alone = apply(
        config, params, np.concatenate([tokens[1:, 7:]] * 2), lengths=np.full((2, LENGTH - 7), LENGTH, np.int32)
    )
    np.testing.assert_allclose(got[1, 7:], alone.logits[0], atol=1e-4)


def test_packed_documents_equal_separate_rows(config, params, tokens):
    segments = np.array([[1] * 40 + [2] * 20, [0] * 5 + [3] * 33 + [4] * 17 + [0] * 5], np.int32)
    packed = apply(config, params, tokens, segment_ids=segments, options=Options(attention="chunked")).logits
    for row, document in ((0, 1), (0, 2), (1, 3), (1, 4)):
        place = segments[row] == document
        alone = apply(config, params, tokens[row : row + 1, place]).logits
        np.testing.assert_allclose(packed[row : row + 1, place], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", pytest.param("mixed", marks=pytest.mark.slow)])
def test_training_forms_agree(name):
    """Stacked and scanned, rematerialised, chunked: one loss and one gradient."""
    config = CONFIGS[name]
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40), dtype=np.int32)

    @partial(jax.jit, static_argnames=("options", "remat"))
    def loss(params, options, remat):
        def value(params):
            out = Qwen2(config, options=options, remat=remat).apply({"params": params}, tokens)
            return jnp.square(out.logits).mean() + 0.01 * out.aux_loss

        return jax.value_and_grad(value)(params)

    expected, gradient = loss(params, Options(attention="dense"), "none")
    stacked = stack_layers(params, config)
    for remat in ("none", "full", "attention"):
        got, stacked_gradient = loss(stacked, Options(attention="chunked"), remat)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(np.abs(theirs).max(), 1e-3)),
            stacked_gradient,
            stack_layers(gradient, config),
        )


def test_nothing_changes_up_to_the_chunk_size(config, params, tokens):
    plain = dataclasses.replace(config, dual_chunk=None)
    short, long = tokens[:, :17], tokens[:, :18]  # distances up to 16
    untempered = dataclasses.replace(
        config, dual_chunk=dataclasses.replace(config.dual_chunk, original_max_position_embeddings=0)
    )
    np.testing.assert_allclose(apply(untempered, params, short).logits, apply(plain, params, short).logits, atol=1e-5)
    assert np.abs(apply(untempered, params, long).logits - apply(plain, params, long).logits)[:, 17].max() > 1e-3


@pytest.mark.parametrize("chunk", [7, 16])
def test_generation_in_pieces(chunk):
    config = CONFIGS["dense"]
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, LENGTH), dtype=np.int32)
    run = partial(generate, config, params, tokens, [LENGTH, 9, 33], max_new_tokens=20)
    expected = run()
    np.testing.assert_array_equal(run(prefill_chunk=chunk), expected)
    one = Generation(config, params, tokens[:, :5], prefill_chunk=1000, max_new_tokens=16)
    assert one._state.cache.size == 32  # a piece longer than the prompt does not make the prompt longer
    for row, length in enumerate([LENGTH, 9, 33]):
        alone = generate(config, params, tokens[row : row + 1, :length], max_new_tokens=20)
        np.testing.assert_array_equal(expected[row : row + 1], alone)


@pytest.mark.parametrize("implementation", ["dense", "chunked", "pallas"])
def test_generation_by_every_path(implementation):
    config = CONFIGS["dense"]
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 40), dtype=np.int32)
    expected = generate(config, params, tokens, [40, 9], max_new_tokens=5)
    got = generate(config, params, tokens, [40, 9], max_new_tokens=5, options=Options(attention=implementation))
    np.testing.assert_array_equal(got, expected)


def test_prefill_lets_kernels_know_that_rows_are_whole():
    """Then cuDNN's parts, which take no mask, can compute it; without a GPU, that is the only complaint left."""
    config = dataclasses.replace(CONFIGS["dense"], dual_chunk=None, head_dim=8)
    params = init_params(config, jax.random.key(0), jnp.bfloat16)
    run = partial(generate, config, params, np.ones((2, 9), np.int32), [9, 4], max_new_tokens=5)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        run(options=Options(attention="cudnn"))
    in_pieces = run(options=Options(attention="cudnn"), prefill_chunk=4)  # which read a cache, as answers do
    np.testing.assert_array_equal(in_pieces, run(prefill_chunk=4))


def test_modes():
    config, length = PUBLISHED["qwen2-7b-instruct"], 131072
    modes = {mode: LongContext(mode).configure(config, length) for mode in MODES}
    assert modes["plain"] == config
    assert modes["yarn"].yarn == Yarn(4.0, 32768)
    assert modes["dca"].dual_chunk == DualChunk(32768, 1024)
    assert modes["dca-temperature"].dual_chunk == DualChunk(32768, 1024, 32768)
    assert (modes["dca-yarn"].yarn, modes["dca-yarn"].dual_chunk) == (Yarn(4.0, 32768), DualChunk(32768, 1024))
    sized = LongContext(
        "dca-temperature", trained_length=4096, chunk_size=3072, local_size=256, temperature_of="prompt"
    )
    assert sized.configure(config, length).dual_chunk == DualChunk(3072, 256, 4096, "prompt")
    shipped = dataclasses.replace(config, dual_chunk=DualChunk(262144, 8192, 262144))
    assert LongContext().configure(shipped, length) == shipped
    assert LongContext("dca").configure(shipped, length).dual_chunk == DualChunk(262144, 8192)


@pytest.mark.parametrize("yarn", [None, Yarn(4.0, 32768), Yarn(1.0, 32768, attention_factor=1.5)])
@pytest.mark.parametrize("dual_chunk", [None, DualChunk(4096, 64), DualChunk(4096, 64, 2048, "prompt")])
def test_without_options_the_checkpoint_is_followed(yarn, dual_chunk):
    config = dataclasses.replace(PUBLISHED["qwen2-7b-instruct"], yarn=yarn, dual_chunk=dual_chunk)
    for length in (1, 40000, 1 << 20):
        assert LongContext().configure(config, length) == config


def test_reach():
    config = PUBLISHED["qwen2-7b-instruct"]
    assert LongContext().reach(config) == 32768
    assert LongContext("yarn").reach(config) == 1 << 20
    assert LongContext("yarn", yarn_factor=4.0).reach(config) == 131072
    assert LongContext("dca-temperature").reach(config) is None
    for options in (LongContext("yarn"), LongContext("yarn", trained_length=1000), LongContext("dca-yarn")):
        options.configure(config, options.reach(config) or 1 << 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LongContext("plain", yarn_factor=4.0), "mode plain does not read yarn_factor; mode yarn or dca-yarn does"),
        (LongContext(chunk_size=64), "mode plain does not read chunk_size; mode dca or"),
        (LongContext("dca", temperature_of="prompt"), "mode dca does not read temperature_of; mode"),
        (LongContext("yarn", yarn_factor=0.5), "factor must be at least 1"),
        (LongContext("yarn", trained_length=0), "the trained length must be at least 1, got 0"),
        (LongContext("dca", chunk_size=0), "smaller than chunk_size .0."),
        (LongContext("dca", chunk_size=65536), "chunk_size .65536. must not exceed the trained length .32768."),
        (LongContext("dca", trained_length=4096, chunk_size=8192), "must not exceed the trained length .4096."),
        (LongContext("dca", chunk_size=64, local_size=64), "local_size .64. must be smaller than chunk_size .64."),
        (LongContext("dca", chunk_size=64, local_size=32), "it can be at most 31"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        options.configure(PUBLISHED["qwen2-7b-instruct"], 100)
