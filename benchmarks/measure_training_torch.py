"""transformers with PyTorch's AdamW, as `benchmarks.training` asks for it: float32 weights, products by autocast."""

import contextlib
import time
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.worker import serve


class Training:
    """A few training steps at a time on one device: the same optimizer on the same tokens."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def device_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def answer(self, task: str, **arguments: Any) -> dict[str, Any]:
        return self.prepare(**arguments) if task == "prepare" else self.run()

    def prepare(self, folder: str, dtype: str, batch: int, seq: int, remat: str, steps: int) -> dict[str, Any]:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model.to(self.device).train()
        if remat in ("attention", "full"):
            self.model.gradient_checkpointing_enable()
        decayed = [weight for name, weight in self.model.named_parameters() if weight.ndim > 1]
        others = [weight for name, weight in self.model.named_parameters() if weight.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.products = (
            contextlib.nullcontext() if dtype == "float32" else torch.autocast(self.device.type, dtype=torch.bfloat16)
        )
        tokens = np.random.default_rng(0).integers(self.model.config.vocab_size, size=(batch, seq + 1), dtype=np.int32)
        self.tokens = torch.from_numpy(tokens).long().to(self.device)
        self.steps = steps
        return {
            "device": self.device.type,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def run(self) -> dict[str, Any]:
        begin, losses = time.perf_counter(), []
        for _ in range(self.steps):
            with self.products:
                logits = self.model(self.tokens[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        losses = [float(loss) for loss in losses]
        return {"seconds": time.perf_counter() - begin, "losses": losses}


if __name__ == "__main__":
    serve(Training, lambda engine, task, **arguments: engine.answer(task, **arguments))
