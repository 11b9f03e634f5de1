"""How fast a model runs on the devices that are here, and what they could do at most, measured in the same run.

Two ceilings: how fast memory is copied, which bounds decoding, since it reads every weight for each token; and how fast
matrices are multiplied, which bounds reading a prompt.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen2_jax.config import Qwen2Config
from qwen2_jax.evaluation.memory import free_bytes, most_slots, slot_bytes
from qwen2_jax.evaluation.paths import Paths, Split
from qwen2_jax.evaluation.scoring import Scorer
from qwen2_jax.generation import Generation, bucket
from qwen2_jax.layers import Options
from qwen2_jax.model import Params, abstract_params

COPIED = {"cpu": 512 * 1024**2, "gpu": 1024**3, "tpu": 1024**3}
"""Bytes of the array whose copy is timed: more than caches hold."""

MULTIPLIED = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Rows and columns of the matrices whose product is timed."""

_LEAST_SECONDS = 0.2
"""Of one measurement of a ceiling, with as many calls as that takes."""

_KERNELS = ("kernel", "gate", "up", "down")
"""Last keys of weights that tokens are multiplied with."""


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Of one device."""

    copy: float
    """Bytes per second, those that are read and those that are written."""
    matmul: float
    """Floating-point operations per second of a large product, a multiply and an add being two."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the mathematics of one token needs."""

    layers: float
    """Parameters that it is multiplied with in all layers; of routed experts, the chosen ones."""
    head: float
    """Parameters of the logits."""
    pair: float
    """Floating-point operations of attention for each key that a query sees."""

    def prefill(self, tokens: int) -> float:
        """Floating-point operations of one prompt, of which the last token gets logits."""
        return 2 * (tokens * self.layers + self.head) + self.pair * tokens * (tokens + 1) / 2


def cost_of(config: Qwen2Config) -> Cost:
    layers = head = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config, stacked=True)):
        keys = [part.key for part in path]
        if keys[0] in ("embed", "lm_head"):
            head = float(leaf.size)  # the embedding comes first, and is the head where there is no other
        elif keys[-1] in _KERNELS:
            routed = config.num_experts_per_tok / config.num_experts if "experts" in keys else 1.0
            layers += leaf.size * routed
    heads = config.num_attention_heads * config.head_dim
    return Cost(layers, head, 4.0 * heads * config.num_hidden_layers)


def decode_bytes(config: Qwen2Config, dtype: jax.typing.DTypeLike, rows: int, context: float) -> float:
    """Bytes that one decoding step reads at least, on all devices together.

    Args:
      config: the model.
      dtype: of weights and cache.
      rows: of the batch. Of routed experts, those that so many rows choose on average, if they choose at random.
      context: tokens that each row has read so far.
    """
    itemsize = jnp.dtype(dtype).itemsize
    weights = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config, stacked=True)):
        keys = [part.key for part in path]
        if keys[0] == "embed" and not config.tie_word_embeddings:
            continue  # a row for each token
        share = 1.0
        if "experts" in keys:
            share = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** rows
        weights += leaf.size * share
    return weights * itemsize + rows * context * slot_bytes(config, dtype)[1]


def random_params(
    config: Qwen2Config, dtype: jax.typing.DTypeLike, shardings: Params | None = None, seed: int = 0
) -> Params:
    """Random parameters per layer, made where they are to be, one array at a time and in their own dtype.

    Args:
      config: the model.
      dtype: of every array.
      shardings: of each, as `sharding.param_shardings` has them; the default device by default.
      seed: of the numbers, which are normal for kernels, 1 for norms and 0 for biases.
    """
    key = jax.random.key(seed, impl="rbg")  # the fast generator: these numbers need not be the same everywhere
    abstract = abstract_params(config)

    @functools.cache
    def maker(shape: tuple[int, ...], name: str, sharding: Any) -> Callable[[jax.Array], jax.Array]:
        def make(key: jax.Array) -> jax.Array:
            if name in ("scale", "bias"):
                return jnp.full(shape, name == "scale", dtype)
            return jax.random.normal(key, shape, dtype) * jnp.asarray(config.initializer_range, dtype)

        return jax.jit(make, out_shardings=sharding)

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    arrays = [
        maker(leaf.shape, path[-1].key, place)(jax.random.fold_in(key, index))
        for index, ((path, leaf), place) in enumerate(zip(leaves, places, strict=True))
    ]
    return jax.tree_util.tree_unflatten(tree, arrays)


def ceilings(dtype: jax.typing.DTypeLike, repeats: int = 3, device: Any = None) -> Ceilings:
    """What one device can do, the default one unless another is named; medians of `repeats`."""
    device = jax.devices()[0] if device is None else device
    with jax.default_device(device):
        copied = min(COPIED.get(device.platform, COPIED["gpu"]), free_bytes(device) // 8)
        array = jnp.zeros(max(1, copied // 4), jnp.int32)
        copy = jax.jit(lambda x: x + 1)  # a plain copy might be left out
        bandwidth = 2 * array.nbytes / _timed(functools.partial(copy, array), repeats)
        array.delete()
        side = MULTIPLIED.get(device.platform, MULTIPLIED["gpu"])
        # Equal numbers would flatter a GPU, which takes less power for them and so keeps a higher clock.
        matrix = jax.random.normal(jax.random.key(0, impl="rbg"), (side, side), dtype) / side
        rates = []
        # The model adds up in float32 and rounds; which form is faster depends on the platform.
        for result in {jnp.dtype(dtype), jnp.dtype(jnp.float32)}:
            multiply = jax.jit(functools.partial(lax.dot, preferred_element_type=result))
            rates.append(2.0 * side**3 / _timed(functools.partial(multiply, matrix, matrix), repeats))
    return Ceilings(bandwidth, max(rates))


def _timed(call: Callable[[], jax.Array], repeats: int) -> float:
    """Seconds of a call, of so many in a row that the clock and the way to the device do not matter."""

    def run(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        out.block_until_ready()
        return time.perf_counter() - begin

    run(1)
    calls = max(1, math.ceil(_LEAST_SECONDS / max(run(1), 1e-9)))
    return statistics.median(run(calls) for _ in range(repeats)) / calls


class Bench:
    """Measures one model. Each measurement runs once to compile, and then `repeats` times.

    Args:
      config: the model.
      params: its parameters, per layer.
      dtype: of activations and cache.
      options: how to compute.
      attention: the implementation that the options name, if any.
      repeats: measurements of each kind.
      compile_seconds: seconds that JAX has spent on compiling so far.
      split: how the options divide work over devices.
    """

    def __init__(
        self,
        config: Qwen2Config,
        params: Params,
        dtype: jax.typing.DTypeLike,
        options: Options,
        attention: str | None,
        repeats: int,
        compile_seconds: Callable[[], float],
        split: Split,
    ):
        self.config, self.params, self.dtype, self.options = config, params, jnp.dtype(dtype), options
        self.attention, self.repeats, self.split = attention, repeats, split
        self.paths = Paths(config, self.dtype, options, attention, split)
        self._compiled = compile_seconds
        self._random = np.random.default_rng(0)

    def prefill(self, length: int) -> dict[str, Any]:
        """One prompt into a new cache, up to the choice of its first new token."""
        prompt = self._tokens(1, length)

        def run() -> float:
            begin = time.perf_counter()
            self._start(prompt, 1).advance(1)
            return time.perf_counter() - begin

        seconds, about = self._measure(run)
        flops = cost_of(self.config).prefill(length)
        return {
            "measure": "prefill",
            "tokens": length,
            **about,
            "tokens_per_second": length / seconds,
            "flops": flops,
            "flops_per_second": flops / seconds,
            "attention": self.paths.prompts(1, bucket(length)),
        }

    def decode(self, rows: int, prompt: int, new: int) -> dict[str, Any]:
        """Greedy tokens of a batch after its prompts, in the compiled loop that `generate` runs."""
        prompts = self._tokens(rows, prompt)

        def run() -> float:
            generation = self._start(prompts, 1 + new)
            generation.advance(1)
            begin = time.perf_counter()
            generation.advance()
            return time.perf_counter() - begin

        seconds, about = self._measure(run)
        read = decode_bytes(self.config, self.dtype, rows, prompt + new / 2)
        return {
            "measure": "decode",
            "batch": rows,
            "prompt": prompt,
            "new": new,
            **about,
            "tokens_per_second": rows * new / seconds,
            "seconds_per_step": seconds / new,
            "bytes_per_step": read,
            "bytes_per_second": read * new / seconds,
            "attention": self.paths.decoding(rows, bucket(prompt) + bucket(1 + new)),
        }

    def loglikelihood(self, questions: int, max_length: int) -> dict[str, Any]:
        """Multiple choice through `Scorer`: see `choices`."""
        pairs = choices(questions, self.config.vocab_size, max_length)
        works = []

        def run() -> float:
            scorer = Scorer(self.config, self.params, options=self.options, dtype=self.dtype, multiple=self.split.rows)
            begin = time.perf_counter()
            for _ in scorer.scores(pairs):
                pass
            works.append(scorer.work)
            return time.perf_counter() - begin

        seconds, about = self._measure(run)
        work = works[-1]
        return {
            "measure": "loglikelihood",
            "requests": len(pairs),
            "mix": MIX,
            **about,
            "tokens_given": work.given,
            "tokens_computed": work.tokens,
            "tokens_per_second": work.given / seconds,
            "computed_per_second": work.tokens / seconds,
            "padding": work.padding,
            "programs": len(work.shapes),
            "attention": ", ".join(sorted({path for shape in work.shapes for path in self.paths.scores(*shape)})),
        }

    def chunk(self, rows: int, prompt: int) -> int | None:
        """Tokens of each prompt that are read at once; None for all of them."""
        most = most_slots(jax.default_backend()) * self.split.rows
        width = bucket(prompt)
        # cuDNN's kernels read whole prompts only.
        return (
            None if rows * width <= most or rows == 1 or self.attention == "cudnn" else max(16, most // rows // 16 * 16)
        )

    def _start(self, prompts: np.ndarray, new: int) -> Generation:
        rows, length = prompts.shape
        return Generation(
            *(self.config, self.params, prompts),
            max_new_tokens=new,
            prefill_chunk=self.chunk(rows, length),
            options=self.options,
            dtype=self.dtype,
        )

    def _measure(self, run: Callable[[], float]) -> tuple[float, dict[str, Any]]:
        before = self._compiled()
        run()
        compiled = self._compiled() - before
        samples = [run() for _ in range(self.repeats)]
        seconds = statistics.median(samples)
        return seconds, {"seconds": seconds, "samples": samples, "compile_seconds": compiled}

    def _tokens(self, rows: int, length: int) -> np.ndarray:
        return self._random.integers(self.config.vocab_size, size=(rows, length), dtype=np.int32)


MIX = (
    "half of the questions as MMLU with five examples: 450 tokens shared by 16 questions of 60 to 140 tokens, four "
    "choices of one token; half as HellaSwag: contexts of 60 to 120 tokens, four endings of 10 to 40 tokens"
)


def choices(
    questions: int, vocabulary: int, max_length: int = 2048, seed: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations, random ids, four for each question, of the lengths that `MIX` says.

    Args:
      questions: how many.
      vocabulary: ids are below it.
      max_length: of a context with its continuation, which are shortened where they have more.
      seed: of ids and lengths.
    """
    random = np.random.default_rng(seed)

    def ids(least: int, most: int) -> list[int]:
        return random.integers(vocabulary, size=int(random.integers(least, most + 1))).tolist()

    scale = min(1.0, max_length / 640)
    pairs: list[tuple[list[int], list[int]]] = []
    examples: list[int] = []
    for index in range(questions):
        if index % 2 == 0:
            if index % 32 == 0:
                examples = ids(450, 450)[: int(450 * scale)]
            context = examples + ids(60, 140)[: max(1, int(140 * scale))]
            pairs += [(context, ids(1, 1)) for _ in range(4)]
        else:
            context = ids(60, 120)[: max(1, int(120 * scale))]
            pairs += [(context, ids(10, 40)[: max(1, int(40 * scale))]) for _ in range(4)]
    return pairs


def largest(fits: Callable[[int], bool], numbers: Sequence[int]) -> int:
    """The largest number that fits, from 0 up to the largest of `numbers`; what is smaller than one that fits does."""
    low, high = 0, max(numbers) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
