"""What the model promises whatever the weights: forms of the parameters, padding, packing, cache, remat, logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.cache import empty_cache
from qwen2_jax.layers import Options
from qwen2_jax.model import abstract_params, default_positions, init_params, logical_axes, stack_layers, unstack_layers
from qwen2_jax.remat import REMAT_POLICIES
from tests.qwen2_jax.shapes import MOE, SMALL

CONFIGS = {
    "dense": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "mixed": Qwen2Config(**{**SMALL, "num_hidden_layers": 4}, **MOE, decoder_sparse_step=2),
}


@partial(jax.jit, static_argnames=("config", "options", "logits"))
def apply(config, params, tokens, options=Options(), logits="all", **arguments):
    return Qwen2(config, options=options).apply({"params": params}, tokens, logits=logits, **arguments)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, 11), dtype=np.int32)


def test_both_forms_of_parameters_agree(config, params, tokens):
    stacked = stack_layers(params, config)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked, config), params)
    assert jax.tree.map(lambda leaf: leaf.shape, stacked) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_params(config, stacked=True)
    )
    one, other = apply(config, params, tokens), apply(config, stacked, tokens)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
    np.testing.assert_allclose(one.aux_loss, other.aux_loss, rtol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_init_of_the_module_has_the_declared_tree(config, tokens, stacked):
    shapes = jax.eval_shape(partial(Qwen2(config, stacked=stacked).init, jax.random.key(0)), tokens)["params"]
    shapes = jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda leaf: hasattr(leaf, "names"))
    assert shapes == abstract_params(config, stacked=stacked)


@pytest.mark.parametrize("stacked", [False, True])
def test_every_dim_has_a_logical_axis(config, stacked):
    def check(shape, axes):
        assert len(axes) == len(shape.shape)
        assert all(isinstance(axis, str) for axis in axes)

    jax.tree.map(check, abstract_params(config, stacked=stacked), logical_axes(config, stacked=stacked))


@pytest.mark.parametrize("stacked", [False, True])
def test_remat_changes_no_gradient(config, params, tokens, stacked):
    params = stack_layers(params, config) if stacked else params

    def gradient(remat):
        def loss(params):
            return jnp.square(Qwen2(config, remat=remat).apply({"params": params}, tokens).logits).mean()

        return jax.jit(jax.grad(loss))(params)

    plain = gradient("none")
    for remat in ("full", "attention", "projections") if config.num_hidden_layers == 2 else ("projections",):
        assert remat in REMAT_POLICIES
        jax.tree.map(
            lambda ours, same: np.testing.assert_allclose(ours, same, atol=1e-5, rtol=1e-4), gradient(remat), plain
        )


def test_remat_keeps_less():
    config = Qwen2Config(**{**SMALL, "num_hidden_layers": 6})
    params = abstract_params(config, stacked=True)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def temporaries(remat):
        def loss(params, tokens):
            return Qwen2(config, remat=remat).apply({"params": params}, tokens).logits.mean()

        return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporaries(remat) for remat in ("full", "attention", "projections", "none")]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.5 * sizes[-1]


def test_remat_of_attention_does_not_run_it_again():
    config, params = CONFIGS["dense"], init_params(CONFIGS["dense"], jax.random.key(0))
    tokens = np.ones((1, 8), np.int32)

    def exponentials(remat):
        def loss(params):
            model = Qwen2(config, remat=remat, options=Options(attention="chunked"))
            return model.apply({"params": params}, tokens).hidden.sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text().count("stablehlo.exponential")

    # "full" repeats the two of the online softmax in each of the two layers.
    assert exponentials("attention") + 4 == exponentials("full")


def test_options_change_nothing(config, params, tokens):
    plain = apply(config, params, tokens)
    for options in (Options(attention="chunked"), Options(attention="dense", moe="loop")):
        np.testing.assert_allclose(apply(config, params, tokens, options).logits, plain.logits, atol=2e-5)


def test_packed_documents_equal_separate_rows(config, params, tokens):
    packed = np.concatenate([tokens[0, :6], tokens[1, :4], [0]])[None].astype(np.int32)
    segments = np.array([[1] * 6 + [2] * 4 + [0]], np.int32)
    out = apply(config, params, packed, segment_ids=segments)
    for place, row in ((slice(0, 6), tokens[:1, :6]), (slice(6, 10), tokens[1:, :4])):
        np.testing.assert_allclose(out.logits[:, place], apply(config, params, row).logits, atol=1e-5)


def test_positions_shift_nothing_but_matter(config, params, tokens):
    shifted = np.arange(11, dtype=np.int32)[None].repeat(2, 0) + 100
    plain = apply(config, params, tokens)
    np.testing.assert_allclose(apply(config, params, tokens, positions=shifted).logits, plain.logits, atol=1e-4)
    assert not np.allclose(apply(config, params, tokens, positions=3 * shifted).logits, plain.logits, atol=1e-2)


def test_default_positions():
    segments = jnp.array([[0, 0, 4, 4, 4, 2, 2, 0], [1, 1, 0, 0, 1, 1, 3, 0], [0] * 8], jnp.int32)
    got, real = np.asarray(default_positions(segments)), np.asarray(segments) != 0
    assert got[0, real[0]].tolist() == [0, 1, 2, 0, 1]
    assert got[1, real[1]].tolist() == [0, 1, 2, 3, 0]  # padding amid a document is not counted

    cache = empty_cache(CONFIGS["dense"], 2, 4).replace(segment_ids=jnp.array([[0, 7, 7, 0], [7, 7, 7, 0]], jnp.int32))
    segments = jnp.array([[7, 7, 8, 8], [0, 8, 8, 9]], jnp.int32)
    got, real = np.asarray(default_positions(segments, cache)), np.asarray(segments) != 0
    assert got[0].tolist() == [2, 3, 0, 1]
    assert got[1, real[1]].tolist() == [0, 1, 0]


def test_padding_amid_a_row_changes_nothing(config, params, tokens):
    apart = np.insert(tokens, [4, 4, 4], 0, axis=1)
    segments = np.insert(np.ones_like(tokens), [4, 4, 4], 0, axis=1)
    got = apply(config, params, apart, segment_ids=segments).logits[:, segments[0] == 1]
    np.testing.assert_allclose(got, apply(config, params, tokens).logits, atol=2e-5)


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6]])
@pytest.mark.parametrize("stacked", [False, True])
def test_cache_in_pieces_equals_one_pass(config, params, tokens, pieces, stacked):
    params = stack_layers(params, config) if stacked else params
    # Row 1 is padded on the left: its positions must not count the padding.
    segments = np.ones_like(tokens)
    segments[1, :3] = 0
    whole = apply(
        config, params, tokens, segment_ids=segments, positions=np.cumsum(segments, 1, dtype=np.int32) - segments
    )
    cache, parts = empty_cache(config, 2, 16, jnp.float32, stacked), []
    for start, size in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        place = slice(start, start + size)
        out = apply(config, params, tokens[:, place], segment_ids=segments[:, place], cache=cache)
        cache, _ = out.cache, parts.append(out.logits)
    assert cache.length == 11
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[0], whole.logits[0], atol=2e-5)
    np.testing.assert_allclose(got[1, 3:], whole.logits[1, 3:], atol=2e-5)


def test_last_and_no_logits(config, params, tokens):
    segments = np.array([[1] * 11, [0, 0] + [1] * 5 + [0] * 4], np.int32)
    every = apply(config, params, tokens, segment_ids=segments)
    last = apply(config, params, tokens, segment_ids=segments, logits="last")
    assert last.logits.shape == (2, 1, config.vocab_size)
    np.testing.assert_allclose(last.logits[:, 0], every.logits[[0, 1], [10, 6]], atol=1e-5)
    none = apply(config, params, tokens, segment_ids=segments, logits="none")
    assert none.logits is None
    np.testing.assert_allclose(none.hidden, every.hidden, atol=1e-6)


def test_a_prefill_never_holds_all_logits(config, params):
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    text = apply.lower(config, params, tokens, logits="last").compile().as_text()
    assert f"4096,{config.vocab_size}]" not in text
    assert f"4096,{config.vocab_size}]" in apply.lower(config, params, tokens).compile().as_text()


def test_bfloat16_parameters_give_float32_logits(config, params, tokens):
    rough = apply(config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), tokens)
    assert rough.logits.dtype == jnp.float32
    assert rough.hidden.dtype == jnp.bfloat16
    mixed = jax.eval_shape(Qwen2(config, dtype=jnp.bfloat16).apply, {"params": params}, tokens)
    assert mixed.hidden.dtype == jnp.bfloat16


def test_unknown_remat_is_named(config, params, tokens):
    with pytest.raises(ValueError, match="remat must be one of none, full, .* got 'everything'"):
        Qwen2(config, remat="everything").apply({"params": params}, tokens)
