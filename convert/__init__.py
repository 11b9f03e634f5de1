"""Weights between PyTorch, Hugging Face and our checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.load import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    # Found on first use: the streaming converter is imported from here too and has no need of JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from convert import load

    return getattr(load, name)
