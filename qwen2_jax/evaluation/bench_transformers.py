"""Prefill and decoding by transformers, with random weights, in a process of its own: JSON in, JSON out.

The model is called directly, which is faster than its `generate`.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate bench` measures of this project.

    Args:
      request: "config" as config.json has it, "dtype", "device" ("cpu" or "cuda"), "prefill_length", "batches",
        "prompt_length", "new_tokens" and "repeats".

    Returns:
      "versions", "device", and "results" with medians in seconds and tokens per second.
    """
    import torch
    import transformers

    device = request["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device; install its build for CUDA")
    values = {name: value for name, value in request["config"].items() if name not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(request["config"]["model_type"], **values)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, request["dtype"]), attn_implementation="sdpa"
        ).eval()

    def settle() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def following(tokens: Any, cache: Any) -> tuple[Any, Any]:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values

    def prompts(rows: int, length: int) -> Any:
        return torch.randint(config.vocab_size, (rows, length), device=device)

    def prefill() -> float:
        tokens = prompts(1, request["prefill_length"])
        settle()
        begin = time.perf_counter()
        following(tokens, None)
        settle()
        return time.perf_counter() - begin

    def decode(rows: int) -> float:
        token, cache = following(prompts(rows, request["prompt_length"]), None)
        settle()
        begin = time.perf_counter()
        for _ in range(request["new_tokens"]):
            token, cache = following(token, cache)
        settle()
        return time.perf_counter() - begin

    def median(run: Callable[[], float]) -> float:
        run()
        return statistics.median(run() for _ in range(request["repeats"]))

    with torch.inference_mode():
        seconds = median(prefill)
        rate = request["prefill_length"] / seconds
        results = [{"measure": "prefill", "seconds": seconds, "tokens_per_second": rate}]
        for rows in request["batches"]:
            seconds = median(functools.partial(decode, rows))
            rate = rows * request["new_tokens"] / seconds
            results.append({"measure": "decode", "batch": rows, "seconds": seconds, "tokens_per_second": rate})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": versions, "device": device, "results": results}


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
