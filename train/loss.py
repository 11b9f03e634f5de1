"""The training objective of pre-training: next-token cross entropy, without ever holding [B, T, V] logits.

The gradient of the logits is computed as they are, chunk by chunk, and turned at once into those of the hidden states
and of the head: three products with the head in all, where keeping nothing and computing the logits again in the
backward pass would take four, a third more. What is kept between the passes, the gradients themselves, would be there
in any case.

On a mesh every device goes through its own tokens. The head is gathered once, ahead of the loop, and its gradient is
summed over the devices once, behind it. Over a vocabulary split over `tensor` devices exchange three numbers per token,
and never logits.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qwen2_jax.config import Qwen2Config
from qwen2_jax.einsum import einsum
from qwen2_jax.model import Output, Params
from sharding.rules import batch_sharding, weight_spec

IGNORE = -100
"""A target that does not count, as in PyTorch."""

CHUNK = 1024
"""Tokens per device whose logits exist at a time, by default: 0.6 GB in float32 for Qwen2's vocabulary. Fewer would
make a TPU wait for the head, which is read once per chunk."""


class Loss(NamedTuple):
    total: jax.Array
    """Cross entropy plus the weighted load-balancing loss, a scalar float32."""
    cross_entropy: jax.Array
    """Mean over the targets that count, in nats."""
    targets: jax.Array
    """How many count."""


class Split(NamedTuple):
    """The mesh axes over which the loss is computed, for each dim of its arguments."""

    mesh: Mesh
    rows: tuple[str, ...]
    """Of B. Devices along `rows` and `time` hold different tokens."""
    time: tuple[str, ...]
    """Of T."""
    vocab: tuple[str, ...]
    """Of V, in the head. None of `rows` or `time`."""
    embed: tuple[str, ...]
    """Of D, in the head, which is gathered. Some of `rows` and `time`."""


def split_over(config: Qwen2Config, mesh: Mesh, shape: Sequence[int]) -> Split:
    """For targets of `shape`, [B, T], split as `sharding` splits batches and weights."""
    rows, time = (_axes(part) for part in batch_sharding(mesh, shape).spec)
    table = config.vocab_size, config.hidden_size
    vocab, embed = (_axes(part) for part in weight_spec(("vocab", "embed"), table, mesh))
    return Split(mesh, rows, time, vocab, tuple(axis for axis in embed if axis in rows + time))


def next_token_targets(tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """[B, T] int32: the token after each of tokens [B, T]; IGNORE at the end of rows and documents, and on padding."""
    targets = jnp.roll(tokens, -1, axis=1).at[:, -1].set(IGNORE)
    if segment_ids is None:
        return targets
    same = (jnp.roll(segment_ids, -1, axis=1) == segment_ids) & (segment_ids != 0)
    return jnp.where(same, targets, IGNORE)


def next_token_loss(config: Qwen2Config, output: Output, targets: jax.Array) -> Loss:
    """Mean next-token cross entropy in float32, plus router_aux_loss_coef times the load-balancing loss if MoE.

    The plain form of `chunked_loss`, for small inputs.

    Args:
      output: of the model, with all logits [B, T, V].
      targets: [B, T] int32 ids, or IGNORE.

    Source: load-balancing term as in transformers' Qwen2MoeForCausalLM with output_router_logits.
    """
    assert output.logits is not None
    counted = targets != IGNORE
    log_probabilities = jax.nn.log_softmax(output.logits.astype(jnp.float32), axis=-1)
    ids = jnp.where(counted, targets, 0)
    chosen = jnp.take_along_axis(log_probabilities, ids[..., None], axis=-1)[..., 0]
    return _mean(config, output, -jnp.where(counted, chosen, 0.0).sum(), counted.sum(dtype=jnp.int32))


def chunked_loss(
    config: Qwen2Config,
    params: Params,
    output: Output,
    targets: jax.Array,
    chunk: int = CHUNK,
    split: Split | None = None,
) -> Loss:
    """`next_token_loss` of an output without logits.

    Args:
      params: of the model, for its head.
      output: of the model, with logits="none".
      targets: [B, T] int32 ids, or IGNORE.
      chunk: tokens per device whose logits exist at a time.
      split: how the arguments are split over a mesh.
    """
    total = cross_entropy(output.hidden, head_of(config, params), targets, chunk, split)
    return _mean(config, output, total, (targets != IGNORE).sum(dtype=jnp.int32))


def head_of(config: Qwen2Config, params: Params) -> jax.Array:
    """[V, D]: what the logits are computed with, in tied models the embedding."""
    return params["embed"]["embedding"] if config.tie_word_embeddings else params["lm_head"]["kernel"]


def _mean(config: Qwen2Config, output: Output, total: jax.Array, count: jax.Array) -> Loss:
    cross_entropy = total / jnp.maximum(count, 1).astype(jnp.float32)
    total = cross_entropy
    if config.is_moe:
        total += config.router_aux_loss_coef * output.aux_loss
    return Loss(total, cross_entropy, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = CHUNK, split: Split | None = None
) -> jax.Array:
    """Sum over the targets that count of logsumexp(logits) - logits[target], a scalar float32.

    Args:
      hidden: [B, T, D], of the dtype in which products are taken; they accumulate in float32.
      head: [V, D] of any float dtype. Its gradient is accumulated in float32 and comes back in its own dtype.
      targets: [B, T] int32 ids, or IGNORE.
      chunk: tokens per device whose logits exist at a time, at least; one of each row if there are more rows.
      split: how the arguments are split over a mesh.
    """
    return _on_mesh(hidden, head, targets, chunk, split, gradients=False)[0]


def _cross_entropy_fwd(hidden, head, targets, chunk, split):
    total, dhidden, dhead = _on_mesh(hidden, head, targets, chunk, split, gradients=True)
    return total, (dhidden, dhead)


def _cross_entropy_bwd(chunk, split, residuals, dtotal):
    # Together, lest the head's gradient stay unsummed, whole on every device, until the backward pass is through.
    residuals = lax.optimization_barrier(residuals)
    return *((dtotal * unit.astype(jnp.float32)).astype(unit.dtype) for unit in residuals), None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _on_mesh(hidden, head, targets, chunk, split, gradients):
    """The sum, and its gradients if asked for; each device computes those of its own tokens."""
    local = functools.partial(_local, chunk=chunk, split=split, gradients=gradients)
    if split is None:
        return local(hidden, head, targets)
    tokens = PartitionSpec(split.rows, split.time)
    weights = PartitionSpec(split.vocab, split.embed)
    specs = (tokens, weights, tokens)
    results = (PartitionSpec(), *((tokens, weights) if gradients else ()))
    return jax.shard_map(local, mesh=split.mesh, in_specs=specs, out_specs=results, check_vma=False)(
        hidden, head, targets
    )


def _local(hidden, head, targets, chunk, split, gradients):
    tokens, vocab, embed = (split.rows + split.time, split.vocab, split.embed) if split else ((), (), ())
    weights = head.astype(hidden.dtype)
    if embed:
        weights = lax.all_gather(weights, embed, axis=1, tiled=True)
    ids = jnp.arange(len(weights), dtype=jnp.int32)
    if vocab:
        ids += lax.axis_index(vocab) * len(weights)

    def step(dhead, chunk):
        hidden, targets = chunk
        logits = einsum("BTD,VD->BTV", hidden, weights)
        is_target = (ids[None, None] == targets[..., None]).astype(jnp.float32)
        top = _over(lax.pmax, logits.max(axis=-1), vocab)
        sums = jnp.exp(logits - top[..., None]).sum(axis=-1), (logits * is_target).sum(axis=-1)
        exponentials, chosen = _over(lax.psum, sums, vocab)
        lse = top + jnp.log(exponentials)
        counted = targets != IGNORE
        total = jnp.where(counted, lse - chosen, 0.0).sum()
        if not gradients:
            return dhead, (total,)
        dlogits = jnp.where(counted[..., None], jnp.exp(logits - lse[..., None]) - is_target, 0.0).astype(hidden.dtype)
        dhidden = _over(lax.psum, einsum("BTV,VD->BTD", dlogits, weights), vocab).astype(hidden.dtype)
        return dhead + einsum("BTV,BTD->VD", dlogits, hidden), (total, dhidden)

    zeros = jnp.zeros(weights.shape if gradients else (), jnp.float32)
    dhead, (totals, *dchunks) = lax.scan(step, zeros, _in_chunks(hidden, targets, chunk))
    total = _over(lax.psum, totals.sum(), tokens)
    if not gradients:
        return (total,)
    dhidden = dchunks[0].swapaxes(0, 1).reshape(len(hidden), -1, hidden.shape[-1])[:, : hidden.shape[1]]
    if embed:
        dhead = lax.psum_scatter(dhead, embed, scatter_dimension=1, tiled=True)
    dhead = _over(lax.psum, dhead, tuple(axis for axis in tokens if axis not in embed))
    return total, dhidden, dhead.astype(head.dtype)


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dim of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else part or ()


def _in_chunks(hidden: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """[chunks, B, T', D] and [chunks, B, T']: equal parts of T, with as little padding as their number allows."""
    rows, time = targets.shape
    count = -(-time // max(1, chunk // rows))
    size = -(-time // count)
    padding = ((0, 0), (0, count * size - time))
    hidden = jnp.pad(hidden, (*padding, (0, 0)))
    targets = jnp.pad(targets, padding, constant_values=IGNORE)
    return (
        hidden.reshape(rows, count, size, -1).swapaxes(0, 1),
        targets.reshape(rows, count, size).swapaxes(0, 1),
    )


def _over(reduce, x, axes: tuple[str, ...]):
    return reduce(x, axes) if axes else x
