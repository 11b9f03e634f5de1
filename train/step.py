"""One optimizer step: a pure function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import Params, abstract_params, init_params
from sharding.rules import optimizer_shardings, param_shardings
from train.guard import Guard, GuardState, acceptable, init_guard, recorded
from train.objective import Objective, Step
from train.pretraining import Pretraining


class TrainState(NamedTuple):
    """Everything that a step changes; also of shapes or shardings of these arrays."""

    step: Any
    """Batches consumed, a scalar int32, those of skipped steps included."""
    params: Params
    """The masters, in the stacked form."""
    optimizer: Any
    """The state of the optax optimizer."""
    guard: GuardState


class Metrics(NamedTuple):
    """Scalars of one step."""

    loss: jax.Array
    """Before the update."""
    gradient_norm: jax.Array
    """Of all gradients together, before clipping."""
    update_norm: jax.Array
    """Of all parameters' changes together, as they are or would have been."""
    learning_rate: jax.Array
    """Of this update; NaN for an optimizer whose state holds none."""
    accepted: jax.Array
    """Whether the update was made, bool."""
    skipped: jax.Array
    """Steps of the run so far whose update was not made, int32."""
    in_a_row: jax.Array
    """Of these, the ones up to this step without one that was accepted, int32."""
    objective: dict[str, jax.Array]
    """What the objective says of the batch."""


def make_train_step(
    config: Qwen2Config,
    optimizer: optax.GradientTransformation,
    how: Step = Step(),
    objective: Objective = Pretraining(),
    guard: Guard = Guard(),
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The compiled step of one model, objective and optimizer. The state that it is given is used up.

    A step that the guard does not accept leaves parameters and optimizer as they are, bit by bit.

    The optimizer is expected to clip; products take `how.dtype`, losses, sums of gradients and the update are float32.

    Raises:
      ValueError: for a mesh that does not fit the model, or of CPU devices with remat "offload".
    """
    if how.remat == "offload" and how.mesh is not None and how.mesh.devices.flat[0].platform == "cpu":
        # XLA's partitioner fails on the transfers, which are nothing on a CPU anyhow.
        raise ValueError('remat "offload" does not work on a mesh of CPU devices; take "projections" there')
    shardings = None if how.mesh is None else state_shardings(config, optimizer, how.mesh)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        where = None if shardings is None else shardings.params
        loss, sums, gradients = loss_and_gradients(config, state.params, batch, how, objective, where)
        # optax promotes a step count and a rate as it likes, which a strict mode around this step may forbid.
        with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):

            def made(gradients, params, optimizer_state):
                updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
                return updates, optax.apply_updates(params, updates), optimizer_state

            updates, _, candidate = made(gradients, state.params, state.optimizer)
            gradient_norm, update_norm = optax.tree.norm(gradients), optax.tree.norm(updates)
            accepted = acceptable(guard, state.guard, loss, gradient_norm, update_norm)
            # Computed again behind the decision, in the memory of the old: chosen by `where`, the new would be there
            # beside them, on a CPU two copies of the parameters.
            params, optimizer_state = lax.cond(
                accepted,
                lambda *given: made(*given)[1:],
                lambda _, *kept: kept,
                *(gradients, state.params, state.optimizer),
            )
            rate = optax.tree.get(candidate, "learning_rate", jnp.float32(jnp.nan))
        guarded = recorded(state.guard, accepted, loss, gradient_norm)
        metrics = Metrics(
            loss,
            gradient_norm,
            update_norm,
            rate,
            accepted,
            guarded.skipped,
            guarded.in_a_row,
            objective.metrics(sums),
        )
        return TrainState(state.step + 1, params, optimizer_state, guarded), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def loss_and_gradients(
    config: Qwen2Config,
    params: Params,
    batch: Any,
    how: Step = Step(),
    objective: Objective = Pretraining(),
    shardings: Params | None = None,
) -> tuple[jax.Array, Any, Params]:
    """The loss of a batch, what the objective sums up, and the parameters' gradients in float32.

    Args:
      shardings: of the sum of the gradients, if micro-batches are accumulated.

    Raises:
      ValueError: if a batch is not cut into how.accumulate micro-batches.
    """
    several = how.accumulate > 1
    weight = (jax.vmap(objective.weight) if several else objective.weight)(batch).sum()
    weight = jnp.where(weight > 0, weight, 1)

    def share(params: Params, batch: Any) -> tuple[jax.Array, Any]:
        return objective(config, params, batch, how, weight)

    def of_one(batch: Any) -> tuple[jax.Array, Any, Params]:
        (loss, sums), gradients = jax.value_and_grad(share, has_aux=True)(params, batch)
        return loss, sums, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)

    if not several:
        return of_one(batch)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if counts != {how.accumulate}:
        found = ", ".join(map(str, sorted(counts)))
        raise ValueError(
            f"each array of a batch must be [{how.accumulate}, B, T], as so many micro-batches are accumulated; "
            f"the first axes are {found}. Cut the batch into micro-batches"
        )

    def add(sums: Any, batch: Any) -> tuple[Any, None]:
        sums = jax.tree.map(jnp.add, sums, of_one(batch))
        return sums if shardings is None else (*sums[:2], lax.with_sharding_constraint(sums[2], shardings)), None

    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_one, one))
    return lax.scan(add, zeros, batch)[0]


def init_state(
    config: Qwen2Config,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> TrainState:
    """A state with random parameters of `dtype`, made where it belongs."""

    def init(key):
        return new_state(optimizer, init_params(config, key, dtype, stacked=True))

    shardings = None if mesh is None else state_shardings(config, optimizer, mesh)
    return jax.jit(init, out_shardings=shardings)(key)


def new_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """The state before the first step of a run from these parameters, stacked."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), init_guard())


def state_shardings(config: Qwen2Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state with a `NamedSharding` for each array. Raises ValueError as `param_shardings`."""
    params = param_shardings(config, mesh, stacked=True)
    moments = optimizer_shardings(optimizer, abstract_params(config, stacked=True), params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return TrainState(everywhere, params, moments, jax.tree.map(lambda _: everywhere, jax.eval_shape(init_guard)))


def abstract_state(
    config: Qwen2Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s, placed on a mesh if there is one; costs no memory at any size."""
    state = jax.eval_shape(lambda params: new_state(optimizer, params), abstract_params(config, dtype, stacked=True))
    if mesh is None:
        return state
    shardings = state_shardings(config, optimizer, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, shardings)
