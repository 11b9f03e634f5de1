"""One run to be planned: what, where, and how it is spread."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from qwen2_jax.config import Qwen2Config
from qwen2_jax.json_object import read_json_object
from qwen2_jax.sizes import PUBLISHED, published
from sharding.checks import check_divides
from sharding.mesh import MeshSpec, across_slices
from sharding.planner.chips import Topology, parse_topology

Task = Literal["train", "prefill", "decode"]
Remat = Literal["none", "projections", "attention", "full", "offload"]
Optimizer = Literal["adamw", "adamw-bf16", "sgd"]

REMATS: tuple[Remat, ...] = get_args(Remat)
"""The names of `qwen2_jax.remat.REMAT_POLICIES`, from fastest to smallest."""
ANSWER = 128
"""Tokens that a prefill leaves room for: `generate`'s own default."""
STATE_BYTES: dict[Optimizer, tuple[int, ...]] = {"adamw": (4, 4), "adamw-bf16": (2, 4), "sgd": ()}
"""Bytes of each moment of a parameter."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked: everything divides, and the mesh fills the topology.

    Training computes in bfloat16; serving keeps parameters in bfloat16 and computes in it.
    """

    model: str
    config: Qwen2Config
    topology: Topology
    mesh: MeshSpec
    task: Task
    batch: int
    """Rows, all devices together."""
    seq: int
    """Tokens per row; when decoding, those in the cache, the new one included."""
    remat: Remat = "full"
    optimizer: Optimizer = "adamw"
    accumulates: bool = False
    """Whether the rows are one of several parts of a training step, whose gradients are added up."""
    params_bytes: Literal[2, 4] = 4
    """Of a number of the parameters that training keeps."""
    moments: tuple[int, ...] | None = None
    """Bytes of each moment of a parameter, if they are not those of the optimizer's name."""

    @property
    def training(self) -> bool:
        return self.task == "train"

    @property
    def state_bytes(self) -> tuple[int, ...]:
        """Of each moment of a parameter."""
        return STATE_BYTES[self.optimizer] if self.moments is None else self.moments

    @property
    def queries(self) -> int:
        """Tokens per row that go through the model in one step."""
        return 1 if self.task == "decode" else self.seq


def make_request(
    model: str,
    topology: str,
    mesh: str,
    task: Task,
    batch: int,
    seq: int,
    remat: Remat = "full",
    optimizer: Optimizer = "adamw",
    slices: int = 1,
) -> Request:
    """Reads and checks what a user asks for.

    Args:
      model: a published name, or a folder with a config.json.
      topology: as `parse_topology`.
      mesh: as `MeshSpec.parse`.

    Raises:
      OSError, ValueError: for what does not exist, does not multiply or does not divide.
    """
    config = read_config(model)
    place = parse_topology(topology, slices)
    return checked(Request(model, config, place, MeshSpec.parse(mesh), task, batch, seq, remat, optimizer))


def checked(request: Request) -> Request:
    """The same with the mesh resolved. Raises ValueError if it does not fit the topology, the model or the batch."""
    config, place = request.config, request.topology
    for name, value in (("batch", request.batch), ("seq", request.seq)):
        if not 0 < value < 2**40:
            raise ValueError(f"{name} must be positive, got {value}")
    try:
        spec = request.mesh.resolve(place.devices)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    across_slices(spec, place.slices)
    # When serving, several devices may compute the same rows; but prompts are dealt out over `context` as training is.
    rows, tokens = (request.batch if request.training else None), (None if request.task == "decode" else request.seq)
    check_divides(config, spec, rows, tokens)
    if config.max_length is not None and request.seq > config.max_length:
        raise ValueError(f"{request.model} has positions for {config.max_length} tokens, got seq {request.seq}")
    return dataclasses.replace(request, mesh=spec)


def read_config(model: str) -> Qwen2Config:
    """Of a published model, or of a folder with a config.json.

    Raises:
      OSError, ValueError: if there is no such model, or config.json is not one of Qwen2.
    """
    path = Path(model) / "config.json"
    if path.is_file():
        return Qwen2Config.from_hf(read_json_object(path))
    if model.lower() not in PUBLISHED:
        raise ValueError(f"{model} is no folder with a config.json; published models are {', '.join(PUBLISHED)}")
    return published(model)
