"""Whether a model fits the axes of a mesh: found by arithmetic, before anything is built or compiled."""

from qwen2_jax.config import Qwen2Config
from qwen2_jax.heads import HeadLayout, head_layout
from sharding.mesh import MeshSpec


def layout_on(config: Qwen2Config, spec: MeshSpec) -> HeadLayout:
    """How the heads of a model are laid out over the `tensor` axis. Raises ValueError as `head_layout`."""
    if spec.tensor == 1:
        return HeadLayout()
    return head_layout(config.num_attention_heads, config.num_key_value_heads, spec.tensor)


def check_divides(config: Qwen2Config, spec: MeshSpec, batch: int | None = None, length: int | None = None) -> None:
    """Refuses a model, batch or sequence whose dims do not divide over the axes that split them.

    Args:
      config: the model.
      spec: sizes without -1.
      batch: rows of a training batch, all devices together.
      length: tokens per row of a training batch.

    Raises:
      ValueError: one line that names every such dim, the axis, and sizes of the axis over which all of its dims go.
    """
    problems = []
    if spec.expert > 1 and not config.is_moe:
        fsdp = spec.fsdp * spec.expert
        instead = f"data={spec.data * spec.expert}" if config.hidden_size % fsdp else f"fsdp={fsdp}"
        problems.append(f"expert={spec.expert} splits experts, but this model is dense; use {instead}")
    problems += _indivisible(config, spec)
    rows = spec.data * spec.fsdp * spec.expert
    if batch is not None and batch % rows:
        fit = f"{batch + -batch % rows}" if batch < rows else f"{batch - batch % rows} or {batch + -batch % rows}"
        problems.append(f"a batch of {batch} rows does not divide over data x fsdp x expert = {rows}; use {fit}")
    if length is not None and spec.context > 1 and length % (2 * spec.context):
        # Each device takes two pieces of a row, an early and a late one, so that all have the same work.
        step = 2 * spec.context
        problems.append(
            f"{length} tokens do not divide over context={spec.context} in halves; use a multiple of {step}"
        )
    _refuse(spec, problems)


def check_weights(config: Qwen2Config, spec: MeshSpec) -> None:
    """Refuses a model whose weights do not divide over the axes that split them. Raises ValueError as `check_divides`.

    A dense model can be stored on a mesh with `expert`, where every device of it has the same.
    """
    _refuse(spec, _indivisible(config, spec))


def _refuse(spec: MeshSpec, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"mesh {spec} does not fit: {'; '.join(problems)}")


def _indivisible(config: Qwen2Config, spec: MeshSpec) -> list[str]:
    problems, dims = [], _dims(config)
    for axis, sizes in dims.items():
        count = spec.sizes[axis]
        reasons = [f"{name} {size} does not divide over {axis}={count}" for name, size in sizes.items() if size % count]
        if axis == "tensor" and (unspread := _unspread_heads(config, count)):
            reasons.append(unspread)
        if reasons:
            problems.append(f"{', '.join(reasons)}; use {_near(config, dims, axis, count)}")
    return problems


def _dims(config: Qwen2Config) -> dict[str, dict[str, int]]:
    """By axis, the dims that it has to divide; heads have their own way (`qwen2_jax.heads`)."""
    over_tensor = {"vocab_size": config.vocab_size}
    if any(not config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)):
        over_tensor["intermediate_size"] = config.intermediate_size
    dims = {"fsdp": {"hidden_size": config.hidden_size}, "tensor": over_tensor}
    if config.is_moe:
        over_tensor["moe_intermediate_size"] = config.moe_intermediate_size
        over_tensor["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
        dims["expert"] = {"num_experts": config.num_experts}
    return dims


def _unspread_heads(config: Qwen2Config, count: int) -> str | None:
    """Why the heads do not go over so many devices of `tensor`; None if they do."""
    try:
        layout_on(config, MeshSpec(tensor=count))
    except ValueError as error:
        return str(error)
    return None


def _near(config: Qwen2Config, dims: dict[str, dict[str, int]], axis: str, count: int) -> str:
    """The nearest sizes of an axis, below and up to twice as many, over which all of its dims go."""

    def fits(n: int) -> bool:
        return not (any(size % n for size in dims[axis].values()) or (axis == "tensor" and _unspread_heads(config, n)))

    most = max(dims[axis].values())
    lower = next(n for n in range(min(count - 1, most), 0, -1) if fits(n))
    higher = next((n for n in range(count + 1, min(2 * count, most + 1)) if fits(n)), None)
    return f"{axis}={lower}" + (f" or {higher}" if higher else "")
