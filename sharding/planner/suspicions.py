"""What a compiled program should not do, found in its text."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from sharding.planner.hlo import Collective, Program, arrays, bytes_of, executions, loops_of_unknown_length
from sharding.planner.request import Request

LARGE = 1 << 24
"""Bytes from which an array is worth a word."""


def suspicions(request: Request, program: Program, collectives: Sequence[Collective], large: int = LARGE) -> list[str]:
    """One line each for weights and gradients that are moved whole, dense buffers of experts, and activations that
    change their place in every layer. `large` is in bytes."""
    found = [line for one in collectives if bytes_of(one.shape) >= large for line in _of_collective(request, one)]
    found += _dense_expert_buffers(request, program, large)
    if unknown := loops_of_unknown_length(program):
        found.append(f"{unknown} loops whose length depends on data are not counted, nor is anything in them")
    return list(dict.fromkeys(found))


def _of_collective(request: Request, one: Collective) -> Iterator[str]:
    config, mesh = request.config, request.mesh.sizes
    shapes = [dims for _, dims in arrays(one.shape)]
    over = " and ".join(one.axes)
    if one.kind == "all-gather":
        layers = config.num_hidden_layers // config.layer_period
        if layers > 1 and any(len(dims) > 2 and dims[0] == layers for dims in shapes):
            yield f"a weight of all layers is gathered whole over {over}: {one.shape}"
        elif request.training and "fsdp" in one.axes and one.shape.startswith("f32") and _weights(request, shapes):
            yield f"a weight is gathered over {over} in float32, which is twice the bytes: {one.shape}"
        if config.is_moe and "expert" in one.axes and _expert_weights(request, shapes):
            yield f"all experts' weights are gathered over {over}: {one.shape}"
    if one.kind == "all-reduce" and "fsdp" in one.axes and _weights(request, shapes):
        yield f"a gradient is added up whole over {over}, where its part would do: {one.shape}"
    if one.in_loop and one.kind == "collective-permute" and "context" not in one.axes and not one.windowed:
        yield f"activations change their place in every layer, over {over}: {one.shape} ({one.kind})"
    if one.in_loop and one.kind == "all-to-all" and not (config.is_moe and mesh["expert"] > 1 and "expert" in one.axes):
        yield f"activations change their place in every layer, over {over}: {one.shape} ({one.kind})"


def _weights(request: Request, shapes: Iterable[Sequence[int]]) -> bool:
    """Whether an array has the dims of a weight rather than those of activations: no rows of the batch."""
    config, tensor = request.config, request.mesh.tensor
    inner = {
        config.vocab_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
    } - {0}
    inner |= {size // tensor for size in inner}
    kernels = {config.hidden_size * size for size in inner}
    return any(math.prod(dims) in kernels for dims in shapes) or _expert_weights(request, shapes)


def _expert_weights(request: Request, shapes: Iterable[Sequence[int]]) -> bool:
    config, tensor = request.config, request.mesh.tensor
    one = config.moe_intermediate_size * config.hidden_size // tensor
    return config.is_moe and any(len(dims) > 2 and math.prod(dims) == config.num_experts * one for dims in shapes)


def _dense_expert_buffers(request: Request, program: Program, large: int) -> list[str]:
    """Arrays with a place for every token and every expert, most of which would be empty."""
    config, mesh = request.config, request.mesh
    if not config.is_moe:
        return []
    tokens = request.batch * request.queries // (mesh.data * mesh.fsdp * mesh.expert * mesh.context)
    experts = {config.num_experts, config.num_experts // mesh.expert} - {1}
    widths = {
        size // parts
        for size in (config.hidden_size, config.moe_intermediate_size)
        for parts in (1, mesh.tensor, mesh.fsdp)
    }
    found = set()
    for execution in executions(program):
        for kind, dims in arrays(execution.instruction.shape):
            if len(dims) < 3 or bytes_of(f"{kind}[{','.join(map(str, dims))}]") < large:
                continue
            for expert, width in itertools.product(experts & set(dims), widths & set(dims)):
                rest = math.prod(dims) // (expert * width)
                if rest >= max(tokens, 64) and rest % tokens == 0 and rest not in widths:
                    found.add(f"{kind}[{','.join(map(str, dims))}]")
    return [f"an array holds every token for every expert: {shape}" for shape in sorted(found)]
