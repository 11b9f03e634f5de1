"""This project's training step, as `benchmarks.training` asks for it."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from benchmarks.worker import serve
from convert import load_checkpoint
from sharding.mesh import make_mesh
from sharding.run import run_options
from train.objective import Step
from train.optimizer import adamw
from train.pretraining import Batch
from train.report.throughput import peak_memory, work
from train.step import make_train_step, new_state


class Training:
    """A few training steps at a time on one device: AdamW, float32 weights."""

    def __init__(self) -> None:
        self.device = jax.devices()[0]

    def device_memory(self) -> int | None:
        return peak_memory([self.device])

    def answer(self, task: str, **arguments: Any) -> dict[str, Any]:
        return self.prepare(**arguments) if task == "prepare" else self.run()

    def prepare(self, folder: str, dtype: str, batch: int, seq: int, remat: str, steps: int) -> dict[str, Any]:
        config, params = load_checkpoint(folder, stacked=True)
        optimizer = adamw(3e-4)
        mesh = make_mesh("fsdp=1", [self.device])
        how = Step(jnp.dtype(dtype), remat, run_options(config, mesh), mesh=mesh)
        self.step, self.steps = make_train_step(config, optimizer, how), steps
        self.state = jax.jit(lambda params: new_state(optimizer, params), donate_argnums=0)(params)
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch, seq + 1), dtype=np.int32)
        self.batch = Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
        needed = work(config, seq, [self.device])
        return {
            "device": self.device.platform,
            "device_kind": self.device.device_kind,
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "optax": optax.__version__},
            "flops_per_token": needed.products + needed.attention,
            "peak_flops": needed.peak,
        }

    def run(self) -> dict[str, Any]:
        begin, losses = time.perf_counter(), []
        for _ in range(self.steps):
            self.state, metrics = self.step(self.state, self.batch)
            losses.append(metrics.loss)
        jax.block_until_ready(self.state)
        return {"seconds": time.perf_counter() - begin, "losses": [float(loss) for loss in losses]}


if __name__ == "__main__":
    serve(Training, lambda engine, task, **arguments: engine.answer(task, **arguments))
