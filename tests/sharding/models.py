"""Tiny models that fit every mesh of the tests, and what they compute, on one device and on many."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax import Qwen2, Qwen2Config
from qwen2_jax.dual_chunk import DualChunk
from qwen2_jax.layers import Options
from qwen2_jax.model import init_params
from train.loss import next_token_loss, next_token_targets

DENSE = Qwen2Config(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,  # over 4 or 8 devices of tensor: padded
    num_key_value_heads=2,  # and repeated
    initializer_range=0.15,
)
MOE = dataclasses.replace(
    DENSE,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=32,
    router_aux_loss_coef=0.1,  # a tenth of the loss: a wrong gradient of it would show
)
DUAL_CHUNK = DualChunk(10, 3)
MODELS = {
    "dense": DENSE,
    "moe": MOE,
    "dense, dual-chunk": dataclasses.replace(DENSE, dual_chunk=DUAL_CHUNK),
    "moe, dual-chunk": dataclasses.replace(MOE, dual_chunk=DUAL_CHUNK),
}
ROWS, LENGTH = 8, 32


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments [ROWS, LENGTH]: packed documents, a whole row, padding on either side."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, DENSE.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 13:] = 2
    segments[2, :5] = 0
    segments[3, 20:] = 0
    segments[4, 7:9] = 2
    segments[4, 9:] = 3
    return tokens, segments


@functools.cache
def parameters(config: Qwen2Config):
    """Stacked, on one device, biases included."""
    params = init_params(config, jax.random.key(7), stacked=True)
    noise = jax.random.split(jax.random.key(8), len(jax.tree.leaves(params)))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(jax.tree.leaves(params), noise, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@functools.partial(jax.jit, static_argnames=("config", "options", "remat"))
def loss_and_gradients(params, tokens, segments, config: Qwen2Config, options: Options, remat: str = "none"):
    """((loss, (logits [B, T, V], auxiliary loss)), the parameters' gradients)."""

    def loss(params):
        out = Qwen2(config, remat=remat, options=options).apply({"params": params}, tokens, segment_ids=segments)
        total = next_token_loss(config, out, next_token_targets(tokens, segments)).total
        return total, (jnp.where((segments != 0)[..., None], out.logits, 0), out.aux_loss)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def on_one_device(config: Qwen2Config):
    tokens, segments = batch()
    return jax.device_get(loss_and_gradients(parameters(config), tokens, segments, config, Options()))


def assert_equal_to_one_device(config: Qwen2Config, result) -> None:
    """Logits within 1e-5 and every gradient within 1e-4 of its largest entry."""
    (loss, (logits, aux_loss)), gradients = result
    (one_loss, (one_logits, one_aux_loss)), one_gradients = on_one_device(config)
    np.testing.assert_allclose(logits, one_logits, atol=1e-5)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-6)
    np.testing.assert_allclose(aux_loss, one_aux_loss, rtol=1e-6)

    def compare(path, ours, theirs):
        scale = np.abs(theirs).max() + 1e-12
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, jax.device_get(gradients), one_gradients)
