"""The training step of a planned run: the very one that training runs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.planner.request import Request
from sharding.rules import batch_sharding
from sharding.run import run_options
from train.objective import Step
from train.optimizer import OPTIMIZERS
from train.pretraining import Batch, Pretraining
from train.step import abstract_state, make_train_step


def training_program(request: Request, mesh: Mesh) -> Any:
    """The step, traced for a state and a batch on the mesh.

    Rows are packed, so every token has its document and position. One of several parts of a step stands for all: two
    are compiled, which go through the model one after the other.
    """
    config = request.config
    options = run_options(config, mesh, attention="pallas")
    # Rate and z-loss are numbers of no consequence for the program, but that a z-loss of 0 would be left out.
    optimizer = OPTIMIZERS[request.optimizer](1e-4)
    parts = 2 if request.accumulates else 1
    how = Step(remat=request.remat, options=options, mesh=mesh, accumulate=parts)
    step = make_train_step(config, optimizer, how, Pretraining(z_loss=1e-4))
    shape, lead = (request.batch, request.seq), (parts,) if parts > 1 else ()
    at = NamedSharding(mesh, PartitionSpec(*(None for _ in lead), *batch_sharding(mesh, shape).spec))
    ids = jax.ShapeDtypeStruct((*lead, *shape), jnp.int32, sharding=at)
    dtype = jnp.float32 if request.params_bytes == 4 else jnp.bfloat16
    batch = Batch(ids, ids, segment_ids=ids, positions=ids)
    return step.trace(abstract_state(config, optimizer, mesh, dtype), batch)  # type: ignore[attr-defined]
