"""How a checkpoint wants to be sampled: its generation_config.json."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2_jax.json_object import brief, read_json_object
from qwen2_jax.sampling import Sampling

_LARGEST_ID = 2**31 - 1


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
          OSError: if a file cannot be read.
          ValueError: if a file is no JSON object, or a value is of the wrong kind or outside its range.
        """
        ids = _Values(Path(folder) / "config.json")
        values = _Values(Path(folder) / "generation_config.json")
        eos_ids = values.ids("eos_token_id", ids.ids("eos_token_id", ()))
        pad_id = values.integer("pad_token_id", ids.integer("pad_token_id", 0, 0, _LARGEST_ID), 0, _LARGEST_ID)
        most = values.integer("max_new_tokens", 0, 1, _LARGEST_ID) or None
        try:
            return cls(_sampling(values), eos_ids, pad_id, most)
        except ValueError as error:
            raise ValueError(f"{values.path}: {error}") from None


def _sampling(values: "_Values") -> Sampling:
    # All are read, so that a damaged file shows, also where greedy decoding needs none of them.
    sampled = Sampling(
        temperature=values.number("temperature", 1.0),
        top_k=values.integer("top_k", 50, 0, _LARGEST_ID),  # transformers' default, which a silent file counts on
        top_p=values.number("top_p", 1.0),
        repetition_penalty=values.number("repetition_penalty", 1.0),
    )
    return sampled if values.flag("do_sample") else Sampling(repetition_penalty=sampled.repetition_penalty)


class _Values:
    """The values of a file, each of the kind that its key asks for; null counts as absent."""

    def __init__(self, path: Path):
        self.path = path
        self.values = read_json_object(path) if path.exists() else {}

    def flag(self, key: str) -> bool:
        return self._read(key, lambda value: type(value) is bool, "true or false", False)

    def number(self, key: str, default: float) -> float:
        return self._read(key, lambda value: type(value) in (int, float), "a number", default)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        def fits(value: Any) -> bool:
            return type(value) is int and low <= value <= high

        return self._read(key, fits, f"a whole number from {low} to {high}", default)

    def ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        def fits(value: Any) -> bool:
            return all(type(id) is int and 0 <= id <= _LARGEST_ID for id in _listed(value))

        return tuple(_listed(self._read(key, fits, "a token id or a list of token ids", list(default))))

    def _read(self, key: str, fits: Callable[[Any], bool], want: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not fits(value):
            raise ValueError(f"{self.path}: {key} must be {want}, got {brief(value)}")
        return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
