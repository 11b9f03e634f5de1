"""Everything that a model needs to run on a mesh, as one `Options`."""

from jax.sharding import Mesh

from qwen2_jax.config import Qwen2Config
from qwen2_jax.layers import Options
from sharding.attention import SplitAttention
from sharding.checks import check_divides, layout_on
from sharding.experts import ExpertParallel
from sharding.logical import RULES
from sharding.placement import MeshPlacement
from sharding.rules import spec_of


def run_options(
    config: Qwen2Config,
    mesh: Mesh,
    *,
    rules: str = "train",
    attention: str | None = None,
    moe: str | None = None,
    capacity_factor: float | None = None,
) -> Options:
    """How to run a model on a mesh, for `Qwen2(config, options=...)`, `generate` and the training step.

    Args:
      config: the model.
      mesh: of `sharding.mesh.make_mesh`, or any with the axes of MESH_AXES or some of them.
      rules: "train", or "serve" for generation and evaluation.
      attention: an implementation of `qwen2_jax.attention`; None chooses by platform and size.
      moe: a backend of `qwen2_jax.moe`; None chooses by platform.
      capacity_factor: as `Options` has it; None drops nothing.

    Raises:
      ValueError: if a dim of the model does not divide over its axis (each is named, with sizes that do), or for an
        unknown name or axis.
    """
    if rules not in RULES:
        raise ValueError(f"rules must be one of {', '.join(RULES)}, got {rules!r}")
    spec = spec_of(mesh)
    check_divides(config, spec)
    return Options(
        attention=SplitAttention(mesh, attention),
        moe=ExpertParallel(mesh, moe) if config.is_moe else None,
        capacity_factor=capacity_factor,
        heads=layout_on(config, spec),
        placement=MeshPlacement(mesh, RULES[rules]),
    )
