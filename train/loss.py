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
from qwen2_jax.model import Output
from sharding.rules import batch_sharding, weight_spec

IGNORE = -100
"""A target that does not count, as in PyTorch."""

CHUNK = 1024
"""Tokens per device whose logits exist at a time, by default: 0.6 GB in float32 for Qwen2's vocabulary. Fewer would
make a TPU wait for the head, which is read once per chunk."""


class Loss(NamedTuple):
    total: jax.Array
    """Cross entropy plus the weighted z-loss and load-balancing loss, a scalar float32."""
    cross_entropy: jax.Array
    """Mean over the targets that count, in nats."""
    targets: jax.Array
    """How many count."""


class Sums(NamedTuple):
    """Over the targets that count, scalars float32."""

    total: jax.Array
    """Cross entropy plus the weighted z-loss."""
    cross_entropy: jax.Array
    """Of logsumexp(logits) - logits[target], in nats."""
    z: jax.Array
    """Of logsumexp(logits)^2."""


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


def next_token_loss(config: Qwen2Config, output: Output, targets: jax.Array, z_loss: float = 0.0) -> Loss:
    """Mean next-token cross entropy in float32, plus router_aux_loss_coef times the load-balancing loss if MoE.

    The plain form of what `train.pretraining.Pretraining` computes, for small inputs.

    Args:
      output: of the model, with all logits [B, T, V].
      targets: [B, T] int32 ids, or IGNORE.
      z_loss: coefficient of the mean of logsumexp(logits)^2.

    Source: load-balancing term as in transformers' Qwen2MoeForCausalLM with output_router_logits; z-loss, PaLM (arXiv
    2204.02311), section 5.
    """
    assert output.logits is not None
    counted = targets != IGNORE
    count = counted.sum(dtype=jnp.int32)
    logits = output.logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    cross_entropy, z = (
        jnp.where(counted, of_tokens, 0.0).sum() / jnp.maximum(count, 1).astype(jnp.float32)
        for of_tokens in (lse - chosen, jnp.square(lse))
    )
    total = cross_entropy + z_loss * z
    if config.is_moe:
        total += config.router_aux_loss_coef * output.aux_loss
    return Loss(total, cross_entropy, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def loss_sums(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    chunk: int = CHUNK,
    split: Split | None = None,
    z_loss: float = 0.0,
) -> Sums:
    """Sums over the targets that count, of which only the total has a gradient.

    Beside the gradients themselves, their program takes, as XLA:CPU compiles it, two chunks of logits in float32, a
    second array of the head's gradient, as a product is made before it is added, and the head twice in the dtype of
    `hidden`, once transposed: whatever the number of tokens. For Qwen2-0.5B in bfloat16, with the default chunk, these
    are 2.3 GB, which is less than 15% of [B, T, V] in float32 from 28,000 tokens per device on.

    Args:
      hidden: [B, T, D], of the dtype in which products are taken; they accumulate in float32.
      head: [V, D] of any float dtype. Its gradient is accumulated in float32 and comes back in its own dtype.
      targets: [B, T] int32 ids, or IGNORE.
      chunk: tokens per device whose logits exist at a time, at least; one of each row if there are more rows.
      split: how the arguments are split over a mesh.
      z_loss: coefficient of logsumexp(logits)^2 in the total.
    """
    return _on_mesh(hidden, head, targets, chunk, split, z_loss, gradients=False)[0]


def _loss_sums_fwd(hidden, head, targets, chunk, split, z_loss):
    sums, dhidden, dhead = _on_mesh(hidden, head, targets, chunk, split, z_loss, gradients=True)
    return sums, (dhidden, dhead)


def _loss_sums_bwd(chunk, split, z_loss, residuals, dsums):
    # Together, lest the head's gradient stay unsummed, whole on every device, until the backward pass is through.
    residuals = lax.optimization_barrier(residuals)
    return *((dsums.total * unit.astype(jnp.float32)).astype(unit.dtype) for unit in residuals), None


loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd)


def _on_mesh(hidden, head, targets, chunk, split, z_loss, gradients):
    """The sums, and the total's gradients if asked for; each device computes those of its own tokens."""
    local = functools.partial(_local, chunk=chunk, split=split, z_loss=z_loss, gradients=gradients)
    if split is None:
        return local(hidden, head, targets)
    tokens = PartitionSpec(split.rows, split.time)
    weights = PartitionSpec(split.vocab, split.embed)
    specs = (tokens, weights, tokens)
    results = (PartitionSpec(), *((tokens, weights) if gradients else ()))
    return jax.shard_map(local, mesh=split.mesh, in_specs=specs, out_specs=results, check_vma=False)(
        hidden, head, targets
    )


def _local(hidden, head, targets, chunk, split, z_loss, gradients):
    tokens, vocab, embed = (split.rows + split.time, split.vocab, split.embed) if split else ((), (), ())
    weights = head.astype(hidden.dtype)
    if embed:
        weights = lax.all_gather(weights, embed, axis=1, tiled=True)
    first = lax.axis_index(vocab) * len(weights) if vocab else 0
    ids = jnp.arange(len(weights), dtype=jnp.int32)

    def step(dhead, chunk):
        hidden, targets = chunk
        logits = einsum("BTD,VD->BTV", hidden, weights)
        own = targets - first
        own = jnp.where(own < 0, len(weights), own)  # IGNORE and ids of other parts: outside, not from the end
        chosen = jnp.take_along_axis(logits, own[..., None], axis=-1, mode="fill", fill_value=0)[..., 0]
        top = _over(lax.pmax, logits.max(axis=-1), vocab)
        parts = jnp.exp(logits - top[..., None]).sum(axis=-1), chosen
        exponentials, chosen = _over(lax.psum, parts, vocab)
        lse = top + jnp.log(exponentials)
        counted = targets != IGNORE
        sums = jnp.where(counted, lse - chosen, 0.0).sum(), jnp.where(counted, jnp.square(lse), 0.0).sum()
        if not gradients:
            return dhead, (sums,)
        probabilities = jnp.exp(logits - lse[..., None])
        if z_loss:
            probabilities *= 1 + 2 * z_loss * lse[..., None]
        is_target = (ids[None, None] == own[..., None]).astype(jnp.float32)
        dlogits = jnp.where(counted[..., None], probabilities - is_target, 0.0).astype(hidden.dtype)
        dhidden = _over(lax.psum, einsum("BTV,VD->BTD", dlogits, weights), vocab).astype(hidden.dtype)
        if len(chunks[0]) > 1:
            return dhead + einsum("BTD,BTV->DV", hidden, dlogits), (sums, dhidden)
        # XLA:CPU has no such product in bfloat16 for a result that is turned at once, as that of a single chunk. Over
        # one axis X of rows and time it has, but takes twice as long.
        x, dlogits = (array.reshape(-1, array.shape[-1]) for array in (hidden, dlogits))
        return dhead + einsum("XD,XV->DV", x, dlogits), (sums, dhidden)

    chunks = _in_chunks(hidden, targets, chunk)
    zeros = jnp.zeros(weights.shape[::-1] if gradients else (), jnp.float32)
    dhead, (of_chunks, *dchunks) = lax.scan(step, zeros, chunks)
    cross_entropy, z = _over(lax.psum, tuple(one.sum() for one in of_chunks), tokens)
    sums = Sums(cross_entropy + z_loss * z, cross_entropy, z)
    if not gradients:
        return (sums,)
    dhidden = dchunks[0].swapaxes(0, 1).reshape(len(hidden), -1, hidden.shape[-1])[:, : hidden.shape[1]]
    if embed:
        # As arrays of their own: XLA would add up whole tables to cut them into parts that are no whole tiles.
        parts = dhead.reshape(lax.axis_size(embed), -1, dhead.shape[1])
        dhead = lax.psum_scatter(parts, embed, scatter_dimension=0)
    dhead = _over(lax.psum, dhead, tuple(axis for axis in tokens if axis not in embed))
    return sums, dhidden, dhead.T.astype(head.dtype)


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
