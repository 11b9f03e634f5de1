"""What a checkpoint folder holds besides numbers: where it is, its config.json, and the files carried along unread."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.files import expanded, read_json, shown
from convert.step_folder import meant_step, newest_step
from qwen2_jax.config import Qwen2Config
from qwen2_jax.json_object import brief

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "README.md",
)
"""Copied byte for byte between folders. A list, so that nothing unknown (code, say) travels with the weights."""


def local_folder(
    source: str | os.PathLike[str], weights: Literal["safetensors", "pickles", "none"] = "safetensors"
) -> Path:
    """The folder that `source` names: a path, or a hub id such as Qwen/Qwen2-0.5B, which is then downloaded.

    Args:
      source: the path or id.
      weights: what to download besides small files: safetensors; PyTorch's .bin files if there are none; or nothing.

    Raises:
      ValueError: if it is neither, or cannot be downloaded.
    """
    path = expanded(source)
    if os.path.isdir(path):  # unlike Path.is_dir, false for names that are too long
        return path
    if os.path.lexists(path):
        raise ValueError(f"{shown(path)} is a file; a checkpoint is a folder with config.json and weights")
    if (step := meant_step(path)) is not None:
        raise ValueError(f"there is no folder {shown(path)}; did you mean {shown(step)}?")
    name = os.fspath(source)
    if not re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", name, re.ASCII):
        raise ValueError(
            f"there is no folder {shown(path)}; for a model of the Hugging Face hub write owner/name, as "
            "Qwen/Qwen2-0.5B"
        )
    return _downloaded(name, weights)


def _downloaded(name: str, weights: str) -> Path:
    from huggingface_hub import errors, snapshot_download  # slow to import, and only needed here

    small = ["config.json", *CARRIED]
    safetensors, pickles = ["*.safetensors", "model.safetensors.index.json"], ["*.bin", "*.bin.index.json"]
    try:
        if weights == "none":
            return Path(snapshot_download(name, allow_patterns=small))
        folder = Path(snapshot_download(name, allow_patterns=small + safetensors))
        if weights == "pickles" and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=small + pickles))
        return folder
    except errors.GatedRepoError:
        reason = "it needs a token: accept its terms on its page, make a token, and put that into HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "it has no such model: check the name; if the model is private, it needs a token (HF_TOKEN)"
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            reason = "it needs a token, or another one: put it into HF_TOKEN"
        elif isinstance(error, OSError) and error.errno is not None:
            reason = f"it could not be stored: {shown(error.filename or '')} {error.strerror}"
        else:
            detail = " ".join(str(error).split())[:200]
            reason = (
                f"it could not be reached ({detail}); download the model where a network exists and pass the folder"
            )
    raise ValueError(f"there is no folder {name}; the Hugging Face hub was asked for it: {reason}")


def read_config(folder: Path) -> Qwen2Config:
    """Raises ValueError, naming the folder, if config.json is missing, malformed, or not a model that is supported."""
    if not os.path.lexists(folder / "config.json"):
        step = newest_step(folder)
        hint = "expected the folder of a checkpoint" if step is None else f"the run's newest step is {shown(step)}"
        raise ValueError(f"config.json is missing in {shown(os.path.abspath(folder))}; {hint}")
    hf = read_json(folder / "config.json")
    try:
        return Qwen2Config.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{shown(folder)}: {error}") from None


def config_bytes(config: Qwen2Config, dtype: np.dtype) -> bytes:
    """config.json for weights of `dtype`, under the key that the file had before: `dtype`, or older `torch_dtype`."""
    hf = config.to_hf()
    keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["torch_dtype"]
    return json_bytes({**hf, **dict.fromkeys(keys, dtype.name)})


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def carried_files(folder: Path) -> list[Path]:
    """Those of CARRIED that `folder` has.

    Raises:
      ValueError: if one of them is there by name, but is no file.
    """
    present = [folder / name for name in CARRIED if os.path.lexists(folder / name)]
    for path in present:
        if not path.is_file():
            what = "a link to something that is not there" if path.is_symlink() else "not a file"
            raise ValueError(f"{shown(path)} is {what}; restore the file, or remove it")
    return present


def splitting_warnings(folder: Path) -> list[str]:
    """One if transformers will not encode text as the tokenizer in `folder` does, else none."""
    from qwen2_jax.tokenizer import splits_otherwise  # its library is of no use to most of the converter

    if not splits_otherwise(folder):
        return []
    return [
        f"{shown(folder)}: the tokenizer does not split text as Qwen2's does; transformers will, for models of this "
        'type, and get other ids from the same text ("A small model of one\'s own" in docs/training.md makes one that '
        "agrees)"
    ]


def check_vocabulary(folder: Path, config: Qwen2Config) -> None:
    """Raises ValueError if the tokenizer in `folder` (if any) can produce ids that the embedding has no row for."""
    largest = max(map(_largest_id, carried_files(folder)), default=-1)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {largest}, but the embedding has {config.vocab_size} rows "
            "(vocab_size in config.json); the tokenizer belongs to another model"
        )


def _largest_id(path: Path) -> int:
    if path.name not in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        return -1
    try:
        # Not read_json: tokenizer files are large, and hold whatever keys their tokens are.
        content = json.loads(path.read_bytes())
        if path.name == "tokenizer.json":
            ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens", ()))]
        else:
            ids = list(content.values())
        return max(map(int, ids), default=-1)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__} {error}"[:200]
        raise ValueError(f"{shown(path)} is not a tokenizer file: {brief(reason, 200)}") from None
