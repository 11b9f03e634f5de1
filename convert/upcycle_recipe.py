"""What is open in the upcycling of a dense model to a mixture of experts, and the configuration that comes of it."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import tyro

from qwen2_jax.config import MODEL_TYPES, Qwen2Config
from qwen2_jax.json_object import brief


def _option(metavar: str, default: str = "") -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the experts are made of a dense model's feed-forward network (FFN).

    A unit is one of the FFN's intermediate dimensions: its row of the gate matrix, its row of the up matrix and its
    column of the down matrix. Copies of the FFN, the units of each in an order of its own, are laid end to end and cut
    into experts; the last copy's rest is dropped. Then a part of every routed expert is drawn anew.

    Source: Qwen2 technical report (arXiv 2407.10671), section 2.2.2. It says neither how the parameters to draw anew
    are picked, nor from what, nor how the router, the shared expert and its gate begin.

    Raises:
      ValueError: if numbers are out of range; all of them are listed.
    """

    experts: Annotated[int, _option("N")]
    """Routed experts per layer."""
    top_k: Annotated[int, _option("N")]
    """Of these, how many each token visits."""
    expert_width: Annotated[int, _option("N")]
    """Units of one routed expert."""
    shared_width: Annotated[int, _option("N")]
    """Units of the shared expert."""
    norm_topk: bool = False
    """Let the weights of a token's experts sum to 1. Qwen2 leaves them as the softmax over all experts has them."""
    reinit_fraction: Annotated[float, _option("X")] = 0.5
    """Part of every routed expert that is drawn anew from a normal distribution; 0 keeps all."""
    reinit: Annotated[Literal["unit", "entry"], _option("{unit,entry}")] = "unit"
    """What is drawn anew: whole units, this part of each expert's, or single numbers, each with this probability."""
    reinit_std: Annotated[float | Literal["match"] | None, _option("{X,match}", "the model's initializer_range")] = None
    """Standard deviation of the new numbers; match takes that of the dense matrix whose place they take."""
    router_std: Annotated[float, _option("X")] = 0.02
    """Standard deviation of the routers, which are drawn anew."""
    shared: Annotated[Literal["preserve", "copy"], _option("{preserve,copy}")] = "preserve"
    """What the shared expert computes at first. preserve: what its units did in the dense FFN; copy: half of that."""
    seed: Annotated[int, _option("N")] = 0
    """Of all that is drawn: the same seed makes the same files."""

    def __post_init__(self) -> None:
        std, counts = self.reinit_std, ("experts", "top_k", "expert_width", "shared_width")
        stds = {"router_std": self.router_std, "reinit_std": 0.0 if std is None or std == "match" else std}
        problems = [
            *(
                f"{_flag(name)} must be at least 1, got {getattr(self, name)}"
                for name in counts
                if getattr(self, name) < 1
            ),
            *(f"{_flag(name)} must be 0 or more and finite, got {x}" for name, x in stds.items() if not _is_std(x)),
        ]
        if self.experts < self.top_k:
            problems.append(f"--top-k must be at most --experts, {self.experts}, got {self.top_k}")
        if not 0 <= self.reinit_fraction <= 1:
            problems.append(f"--reinit-fraction must be from 0 to 1, got {self.reinit_fraction}")
        if self.reinit not in ("unit", "entry") or self.shared not in ("preserve", "copy"):
            problems.append(
                "--reinit must be unit or entry and --shared preserve or copy, got "
                f"{brief(self.reinit)} and {brief(self.shared)}"
            )
        if self.reinit_std is not None and self.reinit_fraction == 0:
            problems.append("--reinit-std is of no use with --reinit-fraction 0; leave it out")
        if not 0 <= self.seed < 1 << 63:
            problems.append(f"--seed must be from 0 to {(1 << 63) - 1}, got {self.seed}")
        if problems:
            raise ValueError("; ".join(problems))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_std(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def upcycled_config(dense: Qwen2Config, recipe: Recipe) -> Qwen2Config:
    """The configuration of what `recipe` makes of a dense model: all that is not about experts is the dense model's.

    Raises:
      ValueError: if the dense model is none, or the experts are larger than any model has.
    """
    if dense.is_moe:
        raise ValueError(
            f"the model has {dense.num_experts} experts per layer already; upcycling begins with a dense one"
        )
    config = dataclasses.replace(
        dense,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        moe_intermediate_size=recipe.expert_width,
        shared_expert_intermediate_size=recipe.shared_width,
        norm_topk_prob=recipe.norm_topk,
        hf_json="",
    )
    # In full, since transformers assumes other defaults for this type; over it what else the dense model's file says,
    # in its own spelling (token ids, how RoPE is written).
    mapping = {key: value for key, value in config.to_hf().items() if not key.startswith("rope_")}
    before = {key: value for key, value in dense.to_hf().items() if value is not None or key not in mapping}
    rope = {} if before.get("rope_parameters") else {"rope_theta": config.rope_theta}
    kind = {"architectures": [MODEL_TYPES["qwen2_moe"]], "model_type": "qwen2_moe"}
    return Qwen2Config.from_hf({**mapping, **rope, **before, **kind})
