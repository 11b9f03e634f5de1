"""Experts on many devices: each holds some of them, and every token meets the ones it chose, exactly.

A token is sent once to each device that holds any of its chosen experts; what they make of it comes back as one row
(`exchange`). Among few devices nearly all tokens go nearly everywhere, so they are gathered and the results are added
and scattered (`gather`), as they are for a few tokens. Nothing is dropped, and memory does not grow, however unevenly
the router chooses: what has no room waits for another round.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qwen2_jax.config import Qwen2Config
from qwen2_jax.moe import Experts, Routing, check_moe, default_backend, dropped_choices, with_capacity
from sharding import expert_exchange
from sharding.expert_exchange import Layer
from sharding.expert_split import VARIANTS, Split, split_experts
from sharding.rules import check_mesh


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """Routed experts for `Options(moe=...)`, split over a mesh.

    Experts are split over `expert`, their inner width over `tensor`; their width is stored over `fsdp` and put together
    for the products, in the activations' dtype. The backward pass computes the experts again, whatever the remat
    policy: no more is kept for it than the layer's input.

    Raises:
      ValueError: for an unknown backend, variant or mesh axis; when called, for experts that do not divide.
    """

    mesh: Mesh
    backend: str | None = None
    """A name in `qwen2_jax.moe.BACKENDS`; None, for the default of the mesh's platform."""
    variant: str | None = None
    """"exchange" or "gather", wherever tokens are split over `expert`; None chooses by size (`split_experts`)."""
    slack: float = 1.25
    """Room for rows over those of balanced routing; with less, the same work takes less memory in more rounds."""

    def __post_init__(self):
        check_mesh(self.mesh)
        check_moe(self.backend, None)
        if self.variant not in (None, *VARIANTS):
            raise ValueError(
                f"variant must be one of {', '.join(VARIANTS)}, or None to choose by size; got {self.variant!r}"
            )
        if not self.slack > 0:
            raise ValueError(f"slack must be positive, got {self.slack}; 1.25 leaves room for a quarter more rows")

    @property
    def platform(self) -> str:
        """Where the mesh's devices are: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def name(self) -> str:
        """For reports; `name_for` also says what sizes lead to."""
        return f"{self._where}, {self.variant or 'exchange or gather by size'}"

    @property
    def _where(self) -> str:
        return f"{self.backend or default_backend(self.platform)}, {self._devices('expert')} devices of expert"

    def name_for(self, config: Qwen2Config, shape: tuple[int, int], dtype: jax.typing.DTypeLike = jnp.bfloat16) -> str:
        """`name` for activations of [B, T] tokens, all devices together, for which the choice by size is made."""
        how = self._split(
            (*shape, config.hidden_size), jnp.dtype(dtype), config.num_experts, config.num_experts_per_tok
        )
        return f"{self._where}, {'no token moves' if how.variant == 'stay' else how.variant}"

    def __call__(
        self, x: jax.Array, routing: Routing, experts: Experts, capacity_factor: float | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The chosen experts' weighted sum, as `qwen2_jax.moe.moe` computes it on one device.

        Args:
          x: [B, T, D] tokens.
          routing: [B, T, k], before any capacity.
          experts: weights of any float dtype, taken in x's dtype.
          capacity_factor: as `qwen2_jax.moe.with_capacity`, of each device's tokens by themselves; None drops nothing.

        Returns:
          [B, T, D] in x's dtype; and, int32, how many choices were dropped on all devices.
        """
        count, choices = experts.gate.shape[0], routing.experts.shape[-1]
        self._check_divides(experts)
        split = self._split(x.shape, x.dtype, count, choices, capacity_factor)
        layer = Layer(
            split=split,
            backend=self.backend or default_backend(self.platform),
            experts=count,
            devices=self._devices("expert"),
            gathered=self._devices("fsdp") > 1,
            dtype=x.dtype,
            ragged=self.platform != "cpu",
        )
        by_token = PartitionSpec(split.rows or None, split.length or None)
        # Devices that work on the same tokens get copies of x and leave summands of the result, as one more dim: the
        # compiler adds up results and gradients in float32, where the sum is needed. The casts cost it nothing.
        copies = PartitionSpec(split.partial or None, *by_token)
        run = jax.shard_map(
            functools.partial(_on_one_device, layer, capacity_factor),
            mesh=self.mesh,
            in_specs=(copies, by_token, by_token, self._stored()),
            out_specs=(copies, PartitionSpec()),
            check_vma=False,  # custom gradients do not say over which axes they vary
        )
        number = math.prod(self._devices(axis) for axis in split.partial)
        out, dropped = run(
            jnp.broadcast_to(x.astype(jnp.float32), (number, *x.shape)),
            routing.weights.astype(jnp.float32),
            routing.experts,
            experts,
        )
        return out.sum(axis=0).astype(x.dtype), dropped

    def _devices(self, axis: str) -> int:
        return self.mesh.shape.get(axis, 1)

    def _split(
        self,
        shape: tuple[int, ...],
        dtype: jnp.dtype,
        experts: int,
        choices: int,
        capacity_factor: float | None = None,
    ) -> Split:
        batch, length, width = shape
        return split_experts(
            self.mesh.shape,
            (batch, length, width),
            experts,
            choices,
            dtype.itemsize,
            self.variant,
            self.slack,
            capacity_factor,
        )

    def _stored(self) -> Experts:
        expert, tensor, fsdp = (axis if self._devices(axis) > 1 else None for axis in ("expert", "tensor", "fsdp"))
        expand = PartitionSpec(expert, tensor, fsdp)
        return Experts(gate=expand, up=expand, down=PartitionSpec(expert, fsdp, tensor))  # type: ignore[arg-type]

    def _check_divides(self, experts: Experts) -> None:
        dims = ("experts", "expert"), ("inner units of an expert", "tensor"), ("units of the model's width", "fsdp")
        for size, (what, axis) in zip(experts.gate.shape, dims, strict=True):
            devices = self._devices(axis)
            if size % devices:
                fit = max(n for n in range(1, devices) if size % n == 0)
                raise ValueError(f"{size} {what} do not divide over {devices} devices; use {axis}={fit}")


def _on_one_device(
    layer: Layer,
    capacity_factor: float | None,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    experts: Experts,
) -> tuple[jax.Array, jax.Array]:
    """x [1, b, t, D] and its choices [b, t, k] -> its part of the result [1, b, t, D], choices dropped everywhere."""
    weights, chosen = (side.reshape(layer.split.tokens, -1) for side in (weights, chosen))
    dropped = jnp.int32(0)
    if capacity_factor is not None:
        # Of the probabilities, only the number of experts is asked for.
        wanted = Routing(weights, chosen, jnp.zeros((0, layer.experts), jnp.float32))
        kept = with_capacity(wanted, capacity_factor)
        weights, chosen, dropped = kept.weights, kept.experts, dropped_choices(wanted, kept)
        dropped = lax.psum(dropped, layer.split.token_axes) if layer.split.token_axes else dropped
    tokens = x.reshape(layer.split.tokens, -1)
    return expert_exchange.run(layer, tokens, weights, chosen, experts).reshape(x.shape), dropped
