"""The model that lm-evaluation-harness calls, for all of its request types.

Registered as "qwen2_jax". The harness (0.4.13) finds models of other packages only once they are imported, so its own
command line runs as `python -m qwen2_jax.plugins.lm_eval run --model qwen2_jax --model_args path=...`; it is the
harness's, unchanged.

Results are those of the harness's own Hugging Face model: the same tokens are scored and generated, contexts that are
too long lose the same tokens, and `generate_until` takes the checkpoint's repetition penalty as transformers does.
"""

import dataclasses
import difflib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qwen2_jax.commands.session import Session, SessionOptions
from qwen2_jax.evaluation import completion
from qwen2_jax.evaluation.completion import Completer, Prompt
from qwen2_jax.evaluation.memory import free_bytes, slot_bytes
from qwen2_jax.evaluation.scoring import Scorer
from qwen2_jax.long_context import LongContext
from qwen2_jax.sampling import Sampling
from sharding.logical import ROW_AXES

NAME = "qwen2_jax"

_logger = logging.getLogger(__name__)

# Standard errors would be drawn by forked processes, and a process with JAX in it must not fork.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

_IGNORED = {"trust_remote_code", "parallelize", "tokenizer_backend", "add_bos_token", "revision"}
"""Arguments of the harness's other models that ask for nothing here when they are false, empty or None."""


_ROLLING_PROGRAMS = 2
"""With those of other scores, and two for each shape of answers, 12 in a run of all kinds of requests."""


@dataclasses.dataclass
class Measured:
    """One kind of requests."""

    requests: int = 0
    seconds: float = 0.0


@register_model(NAME)
class Qwen2JaxLM(TemplateLM):
    """A Qwen2 checkpoint, dense or mixture of experts, on one device or a mesh."""

    def __init__(
        self,
        path: str | None = None,
        *,
        pretrained: str | None = None,
        dtype: str | None = None,
        mesh: str | None = None,
        attention: Any = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        mode: Any = None,
        trained_length: int | None = None,
        yarn_factor: Any = None,
        chunk_size: int | None = None,
        local_size: int | None = None,
        temperature_of: Any = None,
        **others: Any,
    ):
        """
        Args:
          path: folder of a checkpoint, ours or Hugging Face's, of a step of a training run, or a hub id.
          pretrained: the same, under the name that the harness's other models have for it.
          dtype: float32 or bfloat16; as stored by default.
          mesh: devices to spread over, as in "tensor=4"; as model_args, which commas separate, write
            "tensor=4;data=2".
          attention: dense, chunked, pallas or cudnn; by length and platform by default.
          max_length: most tokens that the model sees at once; max_position_embeddings by default.
          max_gen_toks: most tokens of an answer, where the task does not say.
          batch_size: most rows of a batch, or "auto" for as many as memory has room for.
          max_batch_size: a bound for "auto".
          device: checked against the devices that JAX has, which JAX_PLATFORMS chooses.
          seed: of tasks that sample.
          mode: of inputs beyond the trained length, as `qwen2_jax.long_context.LongContext`, like the next five.

        Raises:
          OSError, ValueError: if the checkpoint is missing or damaged, or an argument is unknown or does not fit.
        """
        super().__init__()
        _refuse_unknown(others)
        if (path is None) == (pretrained is None):
            raise ValueError("model_args must name one checkpoint: path=FOLDER")
        _check_device(device)
        long_context = LongContext(
            mode,
            trained_length=trained_length,
            yarn_factor=yarn_factor if yarn_factor in (None, "auto") else float(yarn_factor),
            chunk_size=chunk_size,
            local_size=local_size,
            temperature_of=temperature_of,
        )
        self.session = Session(
            SessionOptions(
                model=str(path or pretrained),
                dtype=_dtype(dtype),
                attention=attention,
                mesh=mesh.replace(";", ",") if mesh else None,
                long_context=long_context,
                seed=seed,
            )
        )
        self._max_rows = _rows(batch_size, max_batch_size)
        self._max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        checkpoint = self.session.config
        if max_length is not None:
            _positive("max_length", max_length)
        length = max_length or checkpoint.max_position_embeddings
        self.config = long_context.configure(checkpoint, length)
        if self.config.max_length is not None and length > self.config.max_length:
            raise ValueError(
                f"max_length is {length}, the model has {self.config.max_length} positions; give at most so many, or "
                "a mode for longer inputs: mode=yarn or mode=dca"
            )
        self._max_length = length
        self._scorer = Scorer(
            *(self.config, self.session.params),
            options=self.session.layer_options,
            max_length=length,
            max_rows=self._max_rows,
            multiple=self._row_devices,
        )
        self._completers: dict[Sampling, Completer] = {}
        self._truncated_prompts = 0
        self.measured: dict[str, Measured] = {}
        self.compile_seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        if jax.process_count() > 1:
            # All processes compute all requests together. This is how the harness knows such runs: each has a request
            # cache of its own, and only the first one gets results.
            os.environ["LOCAL_RANK"] = str(jax.process_index())
        _logger.info("%s", self.memory_line())

    @property
    def _row_devices(self) -> int:
        mesh = self.session.mesh
        return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)

    @property
    def eot_token_id(self) -> int:
        ids = self.session.tokenizer.eos_ids or self.session.generation.eos_ids
        if not ids:
            raise ValueError(f"{self.session.folder}: neither the tokenizer nor the model names an end-of-text token")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.session.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def batch_size(self) -> int | str:
        return self._max_rows or "auto"

    @property
    def tokenizer_name(self) -> str:
        return str(self.session.options.model).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        # Qwen2's tokenizer adds no tokens, whatever is asked for.
        return self.session.tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            raise ValueError(f"the checkpoint has one chat template, and none named {chat_template!r}")
        return self.session.tokenizer.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.session.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        # The last message is to be continued: what the template closes it with comes off, as in transformers.
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)] if last in text else text

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with self._measure("loglikelihood", len(requests)):
            scores = self._scorer.scores([(context, continuation) for _, context, continuation in requests])
            for index, score in _progress(scores, len(requests), "loglikelihood", disable_tqdm):
                results[index] = (score.log_likelihood, score.greedy)
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[index])
        self._report()
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        request_of: list[int] = []
        for index, request in enumerate(requests):
            cut = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
            of_request = [make_disjoint_window(window) for window in cut]
            windows += of_request
            request_of += [index] * len(of_request)
        left = Counter(request_of)
        totals = [0.0] * len(requests)
        with self._measure("loglikelihood_rolling", len(requests)):
            scores = self._scorer.scores(windows, _ROLLING_PROGRAMS)
            for window, score in _progress(scores, len(windows), "rolling windows", disable_tqdm):
                index = request_of[window]
                totals[index] += score.log_likelihood
                left[index] -= 1
                if left[index] == 0:
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, totals[index])
        self._report()
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        by_sampling: dict[Sampling, list[tuple[int, Prompt]]] = {}
        for index, request in enumerate(requests):
            context, arguments = request.args
            prompt, sampling = self._prompt(context, arguments)
            by_sampling.setdefault(sampling, []).append((index, prompt))
        with self._measure("generate_until", len(requests)):
            for sampling, members in by_sampling.items():
                shapes = max(1, completion.SHAPES // len(by_sampling))
                answers = self._completer(sampling).texts([prompt for _, prompt in members], shapes)
                for place, text in _progress(answers, len(members), "generate_until", disable_tqdm):
                    index = members[place][0]
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        self._report()
        return texts

    def _prompt(self, context: str, arguments: dict[str, Any]) -> tuple[Prompt, Sampling]:
        given = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        until = given.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(given.pop("max_gen_toks"))
        sampling = self._sampling(given)
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"an answer of up to {most} tokens leaves no room for a prompt: the model sees {self.max_length}; "
                "lower max_gen_toks, or raise max_length"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self._truncated_prompts += len(tokens) > room
        return Prompt(tokens[-room:], most, tuple(stops)), sampling

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        """How to choose tokens, by the harness's arguments; what they leave open is the checkpoint's, as transformers
        has it."""
        checkpoint = self.session.generation.sampling
        sampled, temperature = given.pop("do_sample", False), float(given.pop("temperature", 0.0))
        known = {name: given.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if name in given}
        if given:
            _logger.warning("generation arguments that change nothing here: %s", ", ".join(sorted(given)))
        penalty = float(known.get("repetition_penalty", checkpoint.repetition_penalty))
        if not sampled or temperature == 0:
            return Sampling(repetition_penalty=penalty)
        return Sampling(
            temperature=temperature,
            top_k=int(known.get("top_k", checkpoint.top_k)),
            top_p=float(known.get("top_p", checkpoint.top_p)),
            repetition_penalty=penalty,
        )

    def _completer(self, sampling: Sampling) -> Completer:
        if sampling not in self._completers:
            generation = self.session.generation
            self._completers[sampling] = Completer(
                *(self.config, self.session.params, self.session.tokenizer),
                eos_ids=tuple({*generation.eos_ids, self.eot_token_id}),
                pad_id=generation.pad_id,
                sampling=sampling,
                seed=self.session.options.seed,
                options=self.session.layer_options,
                max_rows=self._max_rows,
                multiple=self._row_devices,
            )
        return self._completers[sampling]

    @property
    def programs(self) -> int:
        """How many programs of the model were needed so far."""
        answers = [completer.work.shapes for completer in self._completers.values()]
        return len(self._scorer.work.shapes) + 2 * sum(map(len, answers))

    def usage(self) -> dict[str, Any]:
        """What the run took so far: requests and seconds of each kind, tokens, padding, programs."""
        scored = self._scorer.work
        completed = [completer.work for completer in self._completers.values()]
        slots = sum(work.slots for work in completed)
        seconds = {name: measured.seconds for name, measured in self.measured.items()}
        scoring = seconds.get("loglikelihood", 0.0) + seconds.get("loglikelihood_rolling", 0.0)
        new_tokens = sum(work.new_tokens for work in completed)
        return {
            "requests": {name: measured.requests for name, measured in self.measured.items()},
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "compile_seconds": round(self.compile_seconds, 3),
            "programs": self.programs,
            "scored_tokens": scored.given,
            "scored_tokens_computed": scored.tokens,
            "scored_tokens_per_second": round(scored.given / scoring, 1) if scoring else None,
            "scoring_padding": round(scored.padding, 4),
            "new_tokens": new_tokens,
            "new_tokens_per_second": round(new_tokens / seconds["generate_until"], 1)
            if seconds.get("generate_until")
            else None,
            "prompt_padding": round(1 - sum(work.tokens for work in completed) / slots, 4) if slots else 0.0,
            "truncated": scored.truncated + self._truncated_prompts,
            "answers_without_stop": sum(work.unstopped for work in completed),
        }

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results file, which asks once all requests are through."""
        leaves = jax.tree.leaves(self.session.params)
        device = jax.devices()[0]
        return {
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": str(self.session.params["embed"]["embedding"].dtype),
            "model_revision": "",
            "model_sha": "",
            "max_length": self.max_length,
            "device_kind": f"{jax.device_count()} x {device.platform} {device.device_kind}",
            "qwen2_jax": self.usage(),
        }

    def memory_line(self) -> str:
        """What is in memory, and what a batch adds, for the one who has to find out why something did not fit."""
        leaves = jax.tree.leaves(self.session.params)
        held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards[:1])
        device = next(iter(leaves[0].addressable_shards)).device
        activation, cache = slot_bytes(self.config, self._scorer.dtype, self.session.layer_options)
        return (
            f"memory per device: weights {held / 1e9:.2f} GB, free {free_bytes(device) / 1e9:.2f} GB; each token of a "
            f"batch takes {activation / 1e3:.0f} kB while it is computed and {cache / 1e3:.1f} kB of keys and values"
        )

    def _measure(self, kind: str, requests: int) -> "_Stopwatch":
        measured = self.measured.setdefault(kind, Measured())
        measured.requests += requests
        return _Stopwatch(measured)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compile_seconds += duration_secs

    def _report(self) -> None:
        usage = self.usage()
        _logger.info("qwen2_jax: %s", ", ".join(f"{name} {value}" for name, value in usage.items()))
        if usage["truncated"]:
            _logger.warning(
                "%d inputs were longer than %d tokens and lost their beginning", usage["truncated"], self.max_length
            )


class _Stopwatch:
    def __init__(self, measured: Measured):
        self._measured = measured

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._measured.seconds += time.perf_counter() - self._start


def _progress(results: Any, total: int, what: str, disabled: bool) -> Any:
    return tqdm(results, total=total, desc=what, disable=disabled or jax.process_index() != 0)


def _refuse_unknown(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name in _IGNORED and value in (None, False, "", "main", "auto", "huggingface"):
            continue
        names = Qwen2JaxLM.__init__.__kwdefaults__ or {}
        near = difflib.get_close_matches(name, ["path", *names], n=1)
        raise ValueError(f"model_args: there is no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _dtype(name: str | None) -> Literal["float32", "bfloat16"] | None:
    if name in (None, "auto"):
        return None
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32, bfloat16 or auto, got {name!r}")
    return cast(Literal["float32", "bfloat16"], name)


def _rows(batch_size: int | str | None, most: int | None) -> int | None:
    """Rows of a batch at most; None for as many as fit."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return None if most is None else _positive("max_batch_size", most)
    return _positive("batch_size", batch_size)


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
    return number


def _check_device(device: str | None) -> None:
    if device is None:
        return
    wanted, have = str(device).partition(":")[0], jax.default_backend()
    if {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted) != have:
        raise ValueError(f"device is {device!r}, but JAX runs on {have}; choose with JAX_PLATFORMS, or leave it out")


def main(arguments: Sequence[str] | None = None) -> None:
    """The harness's own command line, which now knows this model."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main()
