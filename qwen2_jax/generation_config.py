"""How a checkpoint wants to be sampled: its generation_config.json."""

import dataclasses
from pathlib import Path
from typing import Any

from qwen2_jax.json_object import read_json_object
from qwen2_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Greedy, without an end, unless the checkpoint says otherwise."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    """An answer ends with the first of these; Instruct models have two."""
    pad_id: int = 0
    max_new_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "GenerationConfig":
        """Reads generation_config.json; the ids of end and padding may also stand in config.json.

        Raises:
          ValueError: if a file is no JSON object, or a value is of the wrong kind or outside its range.
        """
        values: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            if (path := Path(folder) / name).exists():
                values |= {key: value for key, value in read_json_object(path).items() if value is not None}
        try:
            return cls(
                sampling=_sampling(values),
                eos_ids=_ids(values.get("eos_token_id", ())),
                pad_id=int(values.get("pad_token_id", 0)),
                max_new_tokens=int(values["max_new_tokens"]) if "max_new_tokens" in values else None,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder) / 'generation_config.json'}: {error}") from error


def _sampling(values: dict[str, Any]) -> Sampling:
    penalty = float(values.get("repetition_penalty", 1.0))
    if not values.get("do_sample", False):
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=float(values.get("temperature", 1.0)),
        top_k=int(values.get("top_k", 50)),  # transformers' default, which a silent file counts on
        top_p=float(values.get("top_p", 1.0)),
        repetition_penalty=penalty,
    )


def _ids(value: int | list[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(int(id) for id in value)
