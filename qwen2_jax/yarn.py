"""YaRN: RoPE frequencies for inputs longer than those a model was trained on, chosen once for every position."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Yarn:
    """The numbers of a YaRN block in config.json; field names are the keys there.

    Fast dimensions keep their frequency, slow ones are divided by `factor`, those between are mixed; queries and keys
    are both scaled by `attention_scale`. The ramp between is linear in the dimension's index, as in all the programs
    that serve Qwen2 (in the paper it is linear in the number of turns).

    Source: YaRN (arXiv 2309.00071), sections 3.2 and 3.4.

    Raises:
      ValueError: if a number is out of its range; all such are listed.
    """

    factor: float
    """How many times longer than the trained length inputs may be, at least 1."""
    original_max_position_embeddings: int
    """The trained length, in tokens."""
    attention_factor: float | None = None
    """Of queries and keys each; None stands for 0.1 ln(factor) + 1."""
    beta_fast: float = 32.0
    """Dimensions that turn at least so often within the trained length keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn at most so often are divided by `factor`."""
    mscale: float | None = None
    """With `mscale_all_dim`, DeepSeek's numerator and denominator of the attention factor."""
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the ramp begins and ends at whole dimensions."""

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if name == "truncate":
                wrong = None if isinstance(value, bool) else "true or false"
            elif value is None and field.default is None:
                wrong = None
            elif isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
                wrong = "a number"
            elif name == "original_max_position_embeddings":
                wrong = None if isinstance(value, int) and value > 0 else "a positive whole number"
            elif name == "factor":
                wrong = None if value >= 1 else "at least 1 (a model is not made for shorter inputs than trained on)"
            else:
                wrong = None if value > 0 else "positive"
            if wrong:
                problems.append(f"{name} must be {wrong}, got {value!r}")
        if not problems and self.beta_fast <= self.beta_slow:
            problems.append(f"beta_fast ({self.beta_fast}) must be larger than beta_slow ({self.beta_slow})")
        if problems:
            raise ValueError("YaRN: " + "; ".join(problems))

    @classmethod
    def from_hf(cls, block: Mapping[str, Any], max_position_embeddings: int) -> "Yarn":
        """Reads a `rope_scaling` or `rope_parameters` block of type "yarn".

        Raises:
          ValueError: for a key that YaRN does not have, no factor, or a number out of range.
        """
        given = {key: value for key, value in block.items() if key not in ("type", "rope_type", "rope_theta")}
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(given.keys() - names):
            raise ValueError(f"YaRN: unknown keys {unknown}")
        if given.get("factor") is None:
            raise ValueError("YaRN: factor is missing; it is the wanted length divided by the trained length")
        if given.get("truncate", True) is None:
            raise ValueError("YaRN: truncate must be true or false, got null; transformers takes that for false")
        given = {key: value for key, value in given.items() if value is not None}
        return cls(**{"original_max_position_embeddings": max_position_embeddings, **given})

    def to_hf(self) -> dict[str, Any]:
        """The block for config.json, with both names of its type: each program reads one of them."""
        numbers = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        return {"type": "yarn", "rope_type": "yarn", **numbers}

    @property
    def max_length(self) -> int:
        """Tokens that the stretched positions reach."""
        return int(self.factor * self.original_max_position_embeddings)

    @property
    def attention_scale(self) -> float:
        """Multiplies the cosines and sines of queries and of keys, and so every score by its square."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return _scale(self.factor, self.mscale) / _scale(self.factor, self.mscale_all_dim)
        return _scale(self.factor, 1.0)

    def ramp(self, head_dim: int, theta: float) -> np.ndarray:
        """[H/2] float32 from 0, where RoPE's frequency stays, to 1, where it is divided by `factor`."""

        def dimension(turns: float) -> float:
            """The (fractional) pair that turns so often within the trained length."""
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high + 0.001 if low == high else high
        index = np.arange(head_dim // 2, dtype=np.float32)
        return np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)


def _scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0
