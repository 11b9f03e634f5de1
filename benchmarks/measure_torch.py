"""transformers on PyTorch's CPU backend, as `benchmarks.worker` asks for it.

The model is called directly, with the cache that transformers makes by default: faster than its `generate`, which does
more around each token.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.worker import serve


class TorchEngine:
    def __init__(self):
        # Imported on first use, which is no part of loading a checkpoint.
        _ = transformers.AutoModelForCausalLM, transformers.Qwen2ForCausalLM, transformers.Qwen2MoeForCausalLM

    def about(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def load(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="eager"
        ).eval()
        # Files were only mapped: a look at every page brings them in.
        for parameter in self.model.parameters():
            parameter.detach().view(torch.uint8).flatten()[::4096].sum()

    @torch.no_grad()
    def prefill(self, prompts: np.ndarray) -> np.ndarray:
        tokens, _ = self._next(torch.from_numpy(prompts).long(), None)
        return tokens[:, 0].numpy()

    @torch.no_grad()
    def decode(self, prompts: np.ndarray, new: int) -> tuple[float, np.ndarray]:
        token, cache = self._next(torch.from_numpy(prompts).long(), None)
        tokens = [token]
        begin = time.perf_counter()
        for _ in range(new):
            token, cache = self._next(token, cache)
            tokens.append(token)
        return time.perf_counter() - begin, torch.cat(tokens, dim=1).numpy()

    def device_memory(self) -> None:
        return None

    def _next(self, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """The most probable token after tokens [B, T], as [B, 1], and the cache with them appended."""
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values


if __name__ == "__main__":
    serve(TorchEngine)
