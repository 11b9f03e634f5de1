"""The training step of a planned run: the very one that training runs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sharding.planner.request import Request
from sharding.rules import batch_sharding
from sharding.run import run_options
from train.objective import Step
from train.optimizer import OPTIMIZERS
from train.pretraining import Batch
from train.step import abstract_state, make_train_step


def training_program(request: Request, mesh: Mesh, attention: str | None = "pallas") -> tuple[Any, tuple[Any, ...]]:
    """A jitted function of (state, batch), and these as `jax.ShapeDtypeStruct`s on the mesh."""
    config = request.config
    options = run_options(config, mesh, attention=attention)
    # The rate is a number of no consequence for the program.
    optimizer = OPTIMIZERS[request.optimizer](1e-4)
    step = make_train_step(config, optimizer, Step(remat=request.remat, options=options, mesh=mesh))
    shape = (request.batch, request.seq)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, shape))
    return step, (abstract_state(config, optimizer, mesh), Batch(tokens=ids, targets=ids))
