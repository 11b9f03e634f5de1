"""This project's sparse block, as `benchmarks.moe` asks for it: on one device or several, or with dense products."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.moe_block import Shape, Side, arrays, shape_from, summary
from benchmarks.worker import serve
from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Options, SparseMoE
from qwen2_jax.moe import Experts, Routing, backend_name, swiglu
from qwen2_jax.projection import project
from sharding.experts import ExpertParallel
from sharding.mesh import MeshSpec, make_mesh


@dataclasses.dataclass(frozen=True)
class DenseEinsum:
    """Every expert over every token, as three einsums, with weights of 0 for those not chosen."""

    name = "dense einsum"

    def __call__(self, x: jax.Array, routing: Routing, experts: Experts, capacity_factor: float | None):
        assert capacity_factor is None
        tokens, count = x.reshape(-1, x.shape[-1]), experts.gate.shape[0]
        chosen = jax.nn.one_hot(routing.experts, count, dtype=x.dtype)
        weights = (chosen * routing.weights[..., None]).sum(axis=-2).reshape(-1, count)
        gate, up = (project("XD,EFD->XEF", tokens, kernel) for kernel in (experts.gate, experts.up))
        hidden = swiglu(gate, up) * weights[..., None]
        return project("XEF,EDF->XD", hidden, experts.down).reshape(x.shape), jnp.zeros((), jnp.int32)


class Block(Side):
    def prepare(self, shape: str, dtype: str, side: str, mesh: str) -> dict[str, Any]:
        """Loads the block. `mesh` is empty, or a `MeshSpec` of simulated devices, with `side` the way of exchange."""
        sizes = shape_from(shape)
        if mesh:
            jax.config.update("jax_num_cpu_devices", MeshSpec.parse(mesh).devices)
            options = Options(moe=ExpertParallel(make_mesh(mesh), variant=side))
        else:
            options = Options(moe=DenseEinsum() if side == DenseEinsum.name else side)
        values = {name: jnp.asarray(array, dtype) for name, array in arrays(sizes).items()}
        self.arguments = _placed(values, options)
        self.programs = _programs(sizes, options)
        return {
            "device": jax.devices()[0].platform,
            "backend": backend_name(options.moe, jax.default_backend()),
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        }

    def run(self, backward: bool) -> dict[str, Any]:
        out, gradients = jax.block_until_ready(self.programs[backward](*self.arguments))
        return summary(np.asarray(out), None if gradients is None else np.asarray(gradients[1]))


def _placed(values: dict[str, jax.Array], options: Options) -> tuple[Any, jax.Array, jax.Array]:
    """The parameters of `SparseMoE`, the tokens, and the gradient of the result."""
    experts = Experts(values["gate"], values["up"], values["down"])
    rest = {
        "router": {"kernel": values["router"]},
        "shared_expert": {name: {"kernel": values[f"shared_{name}"]} for name in ("gate", "up", "down")},
        "shared_expert_gate": {"kernel": values["shared_expert_gate"]},
    }
    tokens = values["x"], values["dout"]
    if isinstance(options.moe, ExpertParallel):
        place = functools.partial(NamedSharding, options.moe.mesh)
        experts = jax.device_put(experts, place(PartitionSpec("expert")))
        rest = jax.device_put(rest, place(PartitionSpec()))
        tokens = jax.device_put(tokens, place(PartitionSpec(("data", "expert"))))
    return {**rest, "experts": experts._asdict()}, *tokens


def _programs(shape: Shape, options: Options):
    """Compiled calls: forward, and forward and backward. Each returns the result and the gradients, or None."""
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=shape.width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=shape.experts,
        num_experts_per_tok=shape.choices,
        moe_intermediate_size=shape.inner,
        shared_expert_intermediate_size=shape.shared_inner,
    )
    real = jnp.ones((shape.batch, shape.length), bool)

    def forward(params, x):
        out: Any = SparseMoE(config, options).apply({"params": params}, x, real)
        return out[0]

    @jax.jit
    def inference(params, x, dout):
        return forward(params, x), None

    @jax.jit
    def training(params, x, dout):
        out, pull = jax.vjp(forward, params, x)
        return out, pull(dout)

    return inference, training


if __name__ == "__main__":
    serve(Block, Block.answer)
