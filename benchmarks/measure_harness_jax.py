"""This project as lm-evaluation-harness calls it, as `benchmarks.harness` asks for it."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows

from benchmarks.worker import serve
from qwen2_jax.plugins.lm_eval import Qwen2JaxLM
from train.report.throughput import peak_memory


class Harness:
    """One part of the requests at a time, in one call, as the harness does for each kind of request."""

    def __init__(self) -> None:
        self.device = jax.devices()[0]

    def device_memory(self) -> int | None:
        return peak_memory([self.device])

    def answer(self, task: str, **arguments: Any) -> dict[str, Any]:
        return self.prepare(**arguments) if task == "prepare" else self.run(**arguments)

    def prepare(self, folder: str, requests: str) -> dict[str, Any]:
        self.model = Qwen2JaxLM(folder, dtype="float32")
        self.parts = json.loads(Path(requests).read_text())
        return {
            "device": self.device.platform,
            "device_kind": self.device.device_kind,
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.model.session.params)),
        }

    def run(self, part: str) -> dict[str, Any]:
        kind = self.parts[part]["kind"]
        instances = [
            Instance(request_type=kind, doc={}, arguments=tuple(arguments), idx=index)
            for index, arguments in enumerate(self.parts[part]["requests"])
        ]
        before = self.model.usage()
        begin = time.perf_counter()
        results = getattr(self.model, kind)(instances, disable_tqdm=True)
        seconds = time.perf_counter() - begin
        usage = self.model.usage()
        counted = "new_tokens" if kind == "generate_until" else "scored_tokens"
        computed = "new_tokens" if kind == "generate_until" else "scored_tokens_computed"
        return {
            "seconds": seconds,
            "results": [result[0] if kind == "loglikelihood" else result for result in results],
            "windows": [self._windows(kind, instance.args[0]) for instance in instances],
            "tokens": usage[counted] - before[counted],
            "computed": usage[computed] - before[computed],
            "programs": usage["programs"],
        }

    def _windows(self, kind: str, text: str) -> int:
        if kind != "loglikelihood_rolling":
            return 1
        tokens = self.model.tok_encode(text)
        windows = get_rolling_token_windows(tokens, self.model.prefix_token_id, self.model.max_length, 1)
        return len(list(windows))


if __name__ == "__main__":
    serve(Harness, lambda engine, task, **arguments: engine.answer(task, **arguments))
