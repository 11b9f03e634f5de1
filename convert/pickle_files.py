"""PyTorch .bin files, which are pickles: read only on request, by PyTorch's restricted loader."""

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np

from convert.dtypes import BY_NAME
from convert.files import identity
from convert.safetensors_files import Tensor
from qwen2_jax.json_object import brief

OLDEST_TORCH = (2, 10)
"""The first release whose weights_only=True has no known way around it (CVE-2025-32434, CVE-2026-24747)."""


class PickleFile:
    """One .bin file, with the interface of `TensorFile`. Its memory is mapped, so it counts as this process's memory.

    Raises:
      ValueError: if PyTorch is missing or older than OLDEST_TORCH, or the file is not a mapping of names to weights.
      OSError: if it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.status = os.stat(path)
        torch = _trusted_torch()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:  # whatever a malformed or hostile pickle provokes in the loader
            reason = str(error)
            if "_use_new_zipfile_serialization" in reason:
                reason = "it is of the format before PyTorch 1.6, or damaged; load and save it with a newer PyTorch"
            reason = " ".join(reason.split())[:200]
            raise ValueError(f"{path} was refused by torch.load(weights_only=True): {reason}") from None
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds a {type(state).__name__}, expected a mapping of names to tensors")
        self.tensors: dict[str, Tensor] = {}
        self._bits: dict[str, np.ndarray] = {}
        for name, tensor in state.items():
            dtype = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or dtype not in BY_NAME:
                raise ValueError(f"{path}: {brief(name)} is {brief(dtype)}; weights can be {', '.join(BY_NAME)}")
            if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
                raise ValueError(f"{path}: {brief(name)} is sparse, nested or without data; expected plain numbers")
            self.tensors[name] = Tensor(BY_NAME[dtype], tuple(tensor.shape), 0)
            if self.tensors[name].nbytes > self.status.st_size:
                raise ValueError(f"{path}: {brief(name)} of shape {brief(list(tensor.shape))} is larger than the file")
            plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
            self._bits[name] = plain.reshape(-1).view(torch.uint8).numpy()

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out` (flat, of the tensor's dtype) with the tensor's numbers from `start` on."""
        if identity(os.stat(self.path)) != identity(self.status):
            raise ValueError(f"{self.path} changed while it was being read; try again once nobody writes to it")
        begin = start * out.itemsize
        out.view(np.uint8)[:] = self._bits[name][begin : begin + out.nbytes]


def _trusted_torch():
    wanted = ".".join(map(str, OLDEST_TORCH))
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"reading .bin files takes PyTorch {wanted} or newer, which is not installed: pip install torch"
        )
    installed = version("torch")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TORCH:
        raise ValueError(
            f"reading .bin files takes PyTorch {wanted} or newer, found {installed}: before that, a crafted file can "
            "run code even with weights_only=True"
        )
    import torch  # only here: everything else in the converter works without it

    return torch
