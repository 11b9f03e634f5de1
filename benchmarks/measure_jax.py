"""This project, as `benchmarks.worker` asks for it."""

import functools
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks.worker import serve
from convert import load_checkpoint
from qwen2_jax import Generation, Qwen2, Qwen2Config
from qwen2_jax.cache import empty_cache
from train.report.throughput import peak_memory


class JaxEngine:
    def __init__(self):
        self.device = jax.devices()[0]

    def about(self) -> dict[str, Any]:
        return {
            "device": self.device.platform,
            "device_kind": self.device.device_kind,
            "versions": {
                "jax": jax.__version__,
                "jaxlib": jaxlib.__version__,
                "flax": flax.__version__,
                "numpy": importlib.metadata.version("numpy"),
            },
        }

    def load(self, folder: Path) -> None:
        self.config, self.params = load_checkpoint(folder)
        jax.block_until_ready(self.params)

    def prefill(self, prompts: np.ndarray) -> np.ndarray:
        _, tokens = _prefill(self.config, self.params, prompts)
        return np.asarray(tokens)

    def decode(self, prompts: np.ndarray, new: int) -> tuple[float, np.ndarray]:
        run = Generation(self.config, self.params, prompts, max_new_tokens=1 + new)
        first = run.advance(1)
        begin = time.perf_counter()
        rest = run.advance()
        return time.perf_counter() - begin, np.concatenate([first, rest], axis=1)

    def device_memory(self) -> int | None:
        return peak_memory([self.device])


@functools.partial(jax.jit, static_argnames="config")
def _prefill(config: Qwen2Config, params: Any, tokens: jax.Array):
    rows, length = tokens.shape
    cache = empty_cache(config, rows, length, params["embed"]["embedding"].dtype)
    out: Any = Qwen2(config).apply({"params": params}, tokens, cache=cache, logits="last")
    return out.cache, jnp.argmax(out.logits[:, 0], axis=-1)


if __name__ == "__main__":
    serve(JaxEngine)
