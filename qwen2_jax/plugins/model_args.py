"""The arguments by which lm-evaluation-harness makes its models: text from a command line, checked."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import jax

_IGNORED = {"trust_remote_code", "parallelize", "tokenizer_backend", "add_bos_token", "revision"}
"""Arguments of the harness's other models that ask for nothing here when they are false, empty or None."""


def refuse_unknown(others: Mapping[str, Any], known: Iterable[str]) -> None:
    """
    Raises:
      ValueError: for an argument that asks for something, with the nearest of those that are known.
    """
    for name, value in others.items():
        if name in _IGNORED and value in (None, False, "", "main", "auto", "huggingface"):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"model_args: there is no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def dtype_named(name: str | None) -> Literal["float32", "bfloat16"] | None:
    """None for the checkpoint's own. Raises ValueError for any other than the two."""
    if name in (None, "auto"):
        return None
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32, bfloat16 or auto, got {name!r}")
    return cast(Literal["float32", "bfloat16"], name)


def most_rows(batch_size: int | str | None, most: int | None) -> int | None:
    """Rows of a batch at most; None for as many as fit. Raises ValueError for what is no such number."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return None if most is None else positive("max_batch_size", most)
    return positive("batch_size", batch_size)


def positive(name: str, value: Any) -> int:
    """The number that an argument is. Raises ValueError for any below 1, and for what is none."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
    return number


def check_device(device: str | None) -> None:
    """Raises ValueError for another device than JAX runs on."""
    if device in (None, "cuda:0"):  # what the harness's command line says where nobody has said anything
        return
    wanted, have = str(device).partition(":")[0], jax.default_backend()
    if {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted) != have:
        raise ValueError(f"device is {device!r}, but JAX runs on {have}; choose with JAX_PLATFORMS, or leave it out")
