"""The parts that cuDNN is given, with its two calls played by plain JAX; on a GPU, cuDNN itself."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import Qwen2
from qwen2_jax.attention import attend, choose, cudnn
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.evaluation.scoring import score_continuations
from qwen2_jax.generation import Generation
from qwen2_jax.layers import Options
from qwen2_jax.model import init_params
from sharding import make_mesh, run_options
from tests.qwen2_jax.attention.cases import make
from tests.sharding.models import DENSE

HAS_GPU = jax.default_backend() == "gpu"


def scores(query, key, causal, scale):
    heads = query.shape[1] // key.shape[1]
    key = jnp.repeat(key, heads, axis=1)
    products = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=jnp.float32) * scale
    past = jnp.arange(query.shape[2])[:, None] >= jnp.arange(key.shape[2])[None]
    return jnp.where(past[None, None] | (not causal), products, -jnp.inf)


def part_forward(query, key, value, causal, scale):
    products = scores(query, key, causal, scale)
    value = jnp.repeat(value, query.shape[1] // key.shape[1], axis=1).astype(jnp.float32)
    out = jnp.einsum("BNTS,BNSH->BNTH", jax.nn.softmax(products), value)
    return out.astype(query.dtype), jax.nn.logsumexp(products, axis=-1)


def part_backward(query, key, value, causal, scale, out, lse, dout):
    """As flash attention does it: weights from the log-sum-exp given, which is that of all keys."""
    groups = query.shape[1] // key.shape[1]
    query32, out, dout = (x.astype(jnp.float32) for x in (query, out, dout))
    key32, value32 = (jnp.repeat(x.astype(jnp.float32), groups, axis=1) for x in (key, value))
    weights = jnp.exp(scores(query, key, causal, scale) - lse[..., None])
    dscores = weights * (jnp.einsum("BNTH,BNSH->BNTS", dout, value32) - (out * dout).sum(-1)[..., None]) * scale
    dkey, dvalue = jnp.einsum("BNTS,BNTH->BNSH", dscores, query32), jnp.einsum("BNTS,BNTH->BNSH", weights, dout)
    dkey, dvalue = (x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2) for x in (dkey, dvalue))
    dquery = jnp.einsum("BNTS,BNSH->BNTH", dscores, key32)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype)


@pytest.fixture
def calls(monkeypatch):
    """Lists the calls' shapes; off a GPU plain JAX answers them."""
    made = []

    def recorded(function):
        def call(query, key, value, causal, *rest):
            made.append((query.shape[2], key.shape[2], causal))
            return function(query, key, value, causal, *rest)

        return call

    forward, backward = (cudnn._part_forward, cudnn._part_backward) if HAS_GPU else (part_forward, part_backward)
    monkeypatch.setattr(cudnn, "_part_forward", recorded(forward))
    monkeypatch.setattr(cudnn, "_part_backward", recorded(backward))
    return made


CASES = {
    "plain": (256, None),
    "plain, odd length": (201, None),
    "one chunk": (128, DualChunk(160, 32)),
    "two": (200, DualChunk(160, 32)),
    "four": (450, DualChunk(160, 32, 160)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense(calls, name):
    length, dual_chunk = CASES[name]
    case = make([[1] * length] * 2, heads=4, kv_heads=2, width=64, dual_chunk=dual_chunk, dtype=jnp.bfloat16)
    context = dataclasses.replace(
        case.context(), whole_rows=True, chunk_length=dual_chunk.chunk_length if dual_chunk else 0
    )
    inputs = case.query, case.rotated_key(), case.value, case.dout

    def run(implementation, dtype):
        rotation = jax.tree.map(lambda x: x.astype(dtype), case.rotations().query)

        @jax.jit
        def call(query, key, value, dout):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, rotation, context, implementation), query, key, value)
            return out, *pull(dout)

        return [np.asarray(x, np.float32) for x in call(*(x.astype(dtype) for x in inputs))]

    exact, rounded, ours = run("dense", jnp.float32), run("chunked", jnp.bfloat16), run("cudnn", jnp.bfloat16)
    for truth, reference, got in zip(exact, rounded, ours, strict=True):
        assert np.abs(got - truth).max() <= 2 * np.abs(reference - truth).max() + 1e-3 * np.abs(truth).max()


@pytest.mark.parametrize("length", [4096, 32768] if HAS_GPU else [384])
@pytest.mark.parametrize("width", [64, 128])
def test_long_rows_equal_the_chunked_path(calls, width, length):
    """In value and gradient, at the heads of Qwen2 and, on a GPU, at the lengths that it is read at."""
    case = make([[1] * length], heads=4, kv_heads=2, width=width, dtype=jnp.bfloat16)
    context = dataclasses.replace(case.context(), whole_rows=True)

    def run(implementation, dtype):
        inputs = [x.astype(dtype) for x in (case.query, case.rotated_key(), case.value, case.dout)]
        rotation = jax.tree.map(lambda x: x.astype(dtype), case.rotations().query)

        @jax.jit
        def call(query, key, value, dout):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, rotation, context, implementation), query, key, value)
            return out, *pull(dout)

        return [np.asarray(x, np.float32) for x in call(*inputs)]

    exact, rounded, ours = run("chunked", jnp.float32), run("chunked", jnp.bfloat16), run("cudnn", jnp.bfloat16)
    for truth, reference, got in zip(exact, rounded, ours, strict=True):
        assert np.abs(got - truth).max() <= 2 * np.abs(reference - truth).max() + 1e-3 * np.abs(truth).max()


def test_parts(calls):
    case = make([[1] * 400], width=64, dual_chunk=DualChunk(160, 32), dtype=jnp.bfloat16)
    context = dataclasses.replace(case.context(), whole_rows=True, chunk_length=128)
    attend(case.query, case.rotated_key(), case.value, case.rotations().query, context, "cudnn")
    own, before, earlier = (128, 128, True), (128, 128, False), [(128, 128, False), (128, 256, False)]
    assert calls == [own, own, before, own, before, earlier[0], own, before, earlier[1]]


@pytest.mark.skipif(HAS_GPU, reason="runs the calls instead of only building them")
def test_calls_are_built_for_cuda(monkeypatch):
    """Off a GPU, the programs with cuDNN's calls can still be built; no score, mask or bias is in them."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda *_: True)
    monkeypatch.setattr(cudnn, "_cudnn", lambda: fused_attention_stablehlo)
    case = make([[1] * 530], heads=4, kv_heads=2, width=64, dual_chunk=DualChunk(160, 32), dtype=jnp.bfloat16)
    context = dataclasses.replace(case.context(), whole_rows=True, chunk_length=128)

    def run(query, key, value):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, case.rotations().query, context, "cudnn"), query, key, value)
        return out, pull(out)

    lowered = jax.jit(run).trace(case.query, case.rotated_key(), case.value).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    # Of five chunks five own, four before, three earlier.
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 12
    assert "fmhaScaleBias" not in text


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"whole_rows": False}, jnp.bfloat16, "does not go with segment_ids or positions"),
        ({"chunk_length": 100}, jnp.bfloat16, "a multiple of 128 tokens, got 100"),
        ({}, jnp.float32, "bfloat16 or float16, got float32"),
        pytest.param({}, jnp.bfloat16, "needs an NVIDIA GPU", marks=pytest.mark.skipif(HAS_GPU, reason="has one")),
    ],
)
def test_refuses(change, dtype, message):
    case = make([[1] * 128], width=64, dtype=dtype)
    context = dataclasses.replace(case.context(), **{"whole_rows": True, "chunk_length": 0, **change})
    with pytest.raises(ValueError, match=message):
        attend(case.query, case.rotated_key(), case.value, case.rotations().query, context, "cudnn")


PROMPT = dict(rows=32, queries=1024, keys=1024, width=64, dtype=jnp.bfloat16, whole_rows=True, chunk_length=0)


@pytest.mark.parametrize(
    ("platform", "change", "chosen"),
    [
        ("gpu", {}, "cudnn"),
        ("gpu", {"chunk_length": 256}, "cudnn"),
        ("gpu", {"queries": 128, "keys": 128}, "dense"),
        ("gpu", {"queries": 1, "keys": 4096, "whole_rows": False}, "dense"),
        ("gpu", {"queries": 4096, "keys": 4096, "whole_rows": False}, "chunked"),
        ("gpu", {"dtype": jnp.float32}, "dense"),
        ("gpu", {"chunk_length": 100}, "dense"),
        ("gpu", {"width": 256}, "dense"),
        ("cpu", {}, "dense"),
        ("cpu", {"queries": 2048, "keys": 2048}, "chunked"),
        ("tpu", {"queries": 2048, "keys": 2048}, "pallas"),
    ],
)
def test_what_is_chosen(platform, change, chosen, monkeypatch):
    monkeypatch.setattr(cudnn, "works", lambda dtype, width: True)
    by_blocks = "pallas" if platform == "tpu" else "chunked"
    assert choose(**{**PROMPT, **change}, platform=platform, by_blocks=by_blocks) == chosen
    monkeypatch.setattr(cudnn, "works", lambda dtype, width: False)
    assert choose(**{**PROMPT, **change}, platform=platform, by_blocks=by_blocks) != "cudnn"


def test_a_trial_comes_before_the_first_use(calls, caplog, monkeypatch):
    trial = cudnn.works.__wrapped__

    @jax.jit
    def traced(x):
        assert trial(jnp.dtype(jnp.bfloat16), 64)
        return x

    traced(1.0)
    assert len(calls) == 2 and not caplog.records
    right = cudnn._part_backward

    def wrong(*arguments):
        dquery, dkey, dvalue = right(*arguments)
        return dquery * jnp.asarray(jnp.nan, dquery.dtype), dkey, dvalue

    def missing(*_):
        raise RuntimeError("no library\nat all")

    cases = (wrong, "computes wrong numbers here: off by nan"), (missing, "does not run here: no library")
    with caplog.at_level(logging.WARNING):
        for function, told in cases:
            monkeypatch.setattr(cudnn, "_part_backward", function)
            assert not trial(jnp.dtype(jnp.bfloat16), 64)
            assert told in caplog.records[-1].getMessage()


@pytest.mark.skipif(HAS_GPU, reason="takes it by itself")
@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2"])
def test_prompts_take_it_and_what_reads_a_cache_does_not(calls, mesh, monkeypatch):
    """Named or chosen, in generation and in log-likelihoods with a shared beginning."""
    config = dataclasses.replace(DENSE, max_position_embeddings=1024)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(config, jax.random.key(0)))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (2, 300), 0, config.vocab_size))
    examples = tokens[0].tolist()
    pairs = [(examples + tokens[1, : 20 + index].tolist(), [3, index]) for index in range(4)]

    def run(attention):
        options = {}
        if mesh is not None:
            devices = jax.devices()[:4]
            options["options"] = run_options(config, make_mesh(mesh, devices), rules="serve", attention=attention)
        elif attention is not None:
            options["options"] = Options(attention=attention)
        made = len(calls)
        answer = Generation(config, params, tokens, max_new_tokens=4, **options).advance()
        prompts = len(calls) - made
        return answer, score_continuations(config, params, pairs, **options), prompts, len(calls) - made - prompts

    plain = run(None)
    assert plain[2:] == (0, 0)
    named = run("cudnn")
    layers = config.num_hidden_layers
    assert named[2] == layers and named[3] == layers  # the prompts; the beginning that is shared
    np.testing.assert_array_equal(named[0], plain[0])
    for one, other in zip(named[1], plain[1], strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=0.1)


def test_not_over_context():
    mesh = make_mesh("context=4", jax.devices()[:4])
    options = run_options(DENSE, mesh, attention="cudnn")
    params = init_params(DENSE, jax.random.key(0))
    with pytest.raises(ValueError, match="needs whole sequences, which an axis of context cuts"):
        Qwen2(DENSE, options=options).apply({"params": params}, jnp.ones((1, 64), jnp.int32))
