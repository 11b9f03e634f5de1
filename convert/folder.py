"""What a checkpoint folder holds besides numbers: where it is, its config.json, and the files carried along unread."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import read_json
from qwen2_jax.config import Qwen2Config

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


def local_folder(source: str | os.PathLike[str], pickles: bool = False) -> Path:
    """The folder that `source` names: a path, or a hub id such as Qwen/Qwen2-0.5B, which is then downloaded.

    Raises:
      ValueError: if it is neither, or cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists():
        raise ValueError(f"{path} is a file; a checkpoint is a folder with config.json and weights")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ValueError(f"there is no folder {path}")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    patterns = ["config.json", *CARRIED, *(["*.bin", "*.bin.index.json"] if pickles else [])]
    patterns += ["*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors; all mean the same here
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"there is no folder {name}, and the Hugging Face hub did not give a model of that name ({reason}); "
            "check the name, or download it where a network exists and pass the folder"
        ) from None


def read_config(folder: Path) -> Qwen2Config:
    """Raises ValueError, naming the folder, if config.json is missing, malformed, or not a model that is supported."""
    hf = read_json(folder / "config.json")
    try:
        return Qwen2Config.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def config_bytes(config: Qwen2Config, dtype: np.dtype) -> bytes:
    """config.json for weights of `dtype`, under the key that the file had before: `dtype`, or older `torch_dtype`."""
    hf = config.to_hf()
    keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["torch_dtype"]
    return json_bytes({**hf, **dict.fromkeys(keys, dtype.name)})


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def carried_files(folder: Path) -> list[Path]:
    return [folder / name for name in CARRIED if (folder / name).is_file()]


def check_vocabulary(folder: Path, config: Qwen2Config) -> None:
    """Raises ValueError if the tokenizer in `folder` (if any) can produce ids that the embedding has no row for."""
    largest = max((_largest_id(folder / name) for name in CARRIED), default=-1)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {largest}, but the embedding has {config.vocab_size} rows "
            "(vocab_size in config.json); the tokenizer belongs to another model"
        )


def _largest_id(path: Path) -> int:
    if not path.is_file() or path.name not in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        return -1
    try:
        # Not read_json: tokenizer files are large, and hold whatever keys their tokens are.
        content = json.loads(path.read_bytes())
        if path.name == "tokenizer.json":
            ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens", ()))]
        else:
            ids = list(content.values())
        return max(map(int, ids), default=-1)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer file: {type(error).__name__} {error}") from None
