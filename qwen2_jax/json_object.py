"""The small JSON files beside the weights, read strictly: they come from others, and every doubt is an error."""

import json
import math
from pathlib import Path
from typing import Any

JSON_LIMIT = 10_000_000
"""Bytes of a file that are read at all; the largest real one, the index of a 57B model's weights, has 0.6 MB."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a small JSON file holds.

    Raises:
      OSError: if it cannot be read.
      ValueError: as `parse_json`, if it is longer than JSON_LIMIT, or holds anything else than an object.
    """
    with path.open("rb") as file:
        text = file.read(JSON_LIMIT + 1)
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path} is longer than {JSON_LIMIT} bytes")
    value = parse_json(text, str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def parse_json(text: bytes, what: str) -> Any:
    """Parses UTF-8 JSON as the standard has it.

    Raises:
      ValueError: naming `what`, for bytes that are not UTF-8, bad syntax, NaN, Infinity or a number too large for a
        float64, one key given twice, or nesting too deep to parse.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {brief(next(k for k in keys if keys.count(k) > 1))} is given twice")
        return result

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(f"{brief(digits)} is not a number that a float64 can hold")
        return number

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{what} is not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{what} is not JSON that can be read: {error}") from None


def printable(text: str) -> str:
    """`text` with its control characters, and others that no terminal shows, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(value: object, limit: int = 80) -> str:
    """`value` from a file, safe to print: one line, no control characters, not long."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[0]}"
