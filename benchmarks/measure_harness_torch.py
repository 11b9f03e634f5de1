"""lm-evaluation-harness's own Hugging Face model on PyTorch's CPU backend, as `benchmarks.harness` asks for it."""

import json
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.worker import serve


class Harness:
    """One part of the requests at a time, in one call, as the harness does for each kind of request."""

    def device_memory(self) -> None:
        return None

    def answer(self, task: str, **arguments: Any) -> dict[str, Any]:
        if task == "prepare":
            return self.prepare(**arguments)
        if task == "warm_up":
            return self.run(arguments["part"], 1, most=2)
        return self.run(**arguments)

    def prepare(self, folder: str, requests: str) -> dict[str, Any]:
        self.model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
        self.parts = json.loads(Path(requests).read_text())
        return {
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "versions": {
                "lm-eval": lm_eval.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def run(self, part: str, batch_size: int, most: int | None = None) -> dict[str, Any]:
        kind = self.parts[part]["kind"]
        instances = [
            Instance(request_type=kind, doc={}, arguments=tuple(arguments), idx=index)
            for index, arguments in enumerate(self.parts[part]["requests"][:most])
        ]
        self.model.batch_size_per_gpu = batch_size
        begin = time.perf_counter()
        results = getattr(self.model, kind)(instances, disable_tqdm=True)
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "results": [result[0] if kind == "loglikelihood" else result for result in results],
        }


if __name__ == "__main__":
    serve(Harness, lambda engine, task, **arguments: engine.answer(task, **arguments))
