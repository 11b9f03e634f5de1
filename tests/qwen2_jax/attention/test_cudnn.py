"""The parts that cuDNN is given, with its two calls played by plain JAX; on a GPU, cuDNN itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.attention import attend, cudnn
from qwen2_jax.dual_chunk import DualChunk
from tests.qwen2_jax.attention.cases import make

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
        ({"whole_rows": False}, jnp.bfloat16, "does not go with segment_ids, positions or a cache"),
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
