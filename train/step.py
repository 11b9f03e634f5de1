"""One optimizer step: a pure function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Options
from qwen2_jax.model import Output, Params, Qwen2, abstract_params, init_params
from qwen2_jax.moe import router_metrics
from sharding.rules import optimizer_shardings, param_shardings
from train.loss import CHUNK, Loss, chunked_loss, split_over


class TrainState(NamedTuple):
    """Everything that a step changes; also of shapes or shardings of these arrays."""

    step: Any
    """Steps taken, a scalar int32."""
    params: Params
    """The masters, in the stacked form."""
    optimizer: Any
    """The state of the optax optimizer."""


class Batch(NamedTuple):
    """Each [B, T] int32; also of their shapes."""

    tokens: Any
    targets: Any
    """The token to predict at each place, or IGNORE."""
    segment_ids: Any = None
    """By default every row is one document."""
    positions: Any = None
    """By default each document counts from 0."""


class Metrics(NamedTuple):
    """Scalars of one step, before it is taken."""

    loss: jax.Array
    cross_entropy: jax.Array
    aux_loss: jax.Array
    gradient_norm: jax.Array
    """Of all gradients together, before clipping."""
    targets: jax.Array
    """How many counted."""
    router: dict[str, jax.Array]
    """`qwen2_jax.moe.router_metrics`; empty for a dense model."""


class Step(NamedTuple):
    """How to compute a step, as opposed to what."""

    dtype: jax.typing.DTypeLike = jnp.bfloat16
    """Of activations, and of weights in products."""
    remat: str = "full"
    """A policy of `qwen2_jax.remat`."""
    options: Options = Options()
    chunk: int = CHUNK
    """Tokens per device whose logits exist at a time."""
    mesh: Mesh | None = None
    """The one that `options` are for."""


def make_train_step(
    config: Qwen2Config, optimizer: optax.GradientTransformation, how: Step = Step()
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step of one model and optimizer. The state that it is given is used up.

    The optimizer is expected to clip; products take `how.dtype`, losses, gradients of weights and the update are
    float32.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, (loss, output) = jax.grad(objective, argnums=1, has_aux=True)(config, state.params, batch, how)
        # optax promotes a step count and a rate as it likes, which a strict mode around this step may forbid.
        with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        router = {} if output.router is None else router_metrics(output.router)
        metrics = Metrics(loss.total, loss.cross_entropy, output.aux_loss, norm, loss.targets, router)
        return TrainState(state.step + 1, params, optimizer_state), metrics

    shardings = None if how.mesh is None else (state_shardings(config, optimizer, how.mesh), None)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def objective(config: Qwen2Config, params: Params, batch: Batch, how: Step) -> tuple[jax.Array, tuple[Loss, Output]]:
    """The scalar that is differentiated, and what it was computed from."""
    model = Qwen2(config, stacked=True, dtype=how.dtype, remat=how.remat, options=how.options)
    output = model.apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids, logits="none")
    assert isinstance(output, Output)
    with jax.named_scope("loss"):
        split = None if how.mesh is None else split_over(config, how.mesh, batch.targets.shape)
        loss = chunked_loss(config, params, output, batch.targets, how.chunk, split)
    return loss.total, (loss, output)


def init_state(
    config: Qwen2Config, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh | None = None
) -> TrainState:
    """A state with random float32 parameters, made where it belongs."""

    def init(key):
        params = init_params(config, key, stacked=True)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = None if mesh is None else state_shardings(config, optimizer, mesh)
    return jax.jit(init, out_shardings=shardings)(key)


def state_shardings(config: Qwen2Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state with a `NamedSharding` for each array. Raises ValueError as `param_shardings`."""
    params = param_shardings(config, mesh, stacked=True)
    moments = optimizer_shardings(optimizer, abstract_params(config, stacked=True), params)
    return TrainState(NamedSharding(mesh, PartitionSpec()), params, moments)


def abstract_state(
    config: Qwen2Config, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s, placed on a mesh if there is one; costs no memory at any size."""
    params = abstract_params(config, stacked=True)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, jax.eval_shape(optimizer.init, params))
    if mesh is None:
        return state
    shardings = state_shardings(config, optimizer, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, shardings)
