"""The model that lm-evaluation-harness calls, for all of its request types.

Registered as "qwen2_jax". The harness (0.4.13) finds models of other packages only once they are imported, so its own
command line runs as `python -m qwen2_jax.plugins.lm_eval run --model qwen2_jax --model_args path=...`; it is the
harness's, unchanged.

Results are those of the harness's own Hugging Face model: the same tokens are scored and generated, contexts that are
too long lose the same tokens, and `generate_until` takes the checkpoint's repetition penalty as transformers does. That
model ends the whole run for one continuation, or room for an answer, that is longer than it can see; this one names the
sample, gives it a result that wins nothing, and goes on.
"""

import logging
import math
import os
import pickle
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qwen2_jax.commands.session import Session, SessionOptions, split_over
from qwen2_jax.commands.stopwatch import Stopwatch
from qwen2_jax.evaluation import completion
from qwen2_jax.evaluation.completion import Completer, Prompt
from qwen2_jax.evaluation.memory import free_on_each, room_for, slot_bytes
from qwen2_jax.evaluation.paths import Paths
from qwen2_jax.evaluation.scoring import Scorer
from qwen2_jax.evaluation.suites import few
from qwen2_jax.long_context import LongContext
from qwen2_jax.plugins.model_args import check_device, dtype_named, most_rows, positive, refuse_unknown
from qwen2_jax.sampling import Sampling

NAME = "qwen2_jax"

_logger = logging.getLogger(__name__)

# Standard errors would be drawn by forked processes, and a process with JAX in it must not fork.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

_ROLLING_PROGRAMS = 2
"""With those of other scores, and two for each shape of answers, 12 in a run of all kinds of requests."""

_THEN = ", then "  # between the paths of one program


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
        refuse_unknown(others, ["path", *(Qwen2JaxLM.__init__.__kwdefaults__ or {})])
        if (path is None) == (pretrained is None):
            raise ValueError("model_args must name one checkpoint: path=FOLDER")
        check_device(device)
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
                dtype=dtype_named(dtype),
                attention=attention,
                mesh=mesh.replace(";", ",") if mesh else None,
                long_context=long_context,
                seed=seed,
            )
        )
        self._max_rows = most_rows(batch_size, max_batch_size)
        self._max_gen_toks = positive("max_gen_toks", max_gen_toks)
        self._asked_length = None if max_length is None else positive("max_length", max_length)
        self._long_context = long_context
        self.skipped: list[str] = []
        """Requests that could not be computed, with the reason."""
        self.see()
        self._split = split_over(self.session.mesh)
        self._room = room_for(
            *(self.config, self.session.params, self._dtype, self.session.layer_options, self._split.rows)
        )
        self._scorers: dict[int, Scorer] = {}
        self._completers: dict[tuple[int, Sampling], Completer] = {}
        self._truncated_prompts = 0
        self._asked: Sequence[Instance] = ()
        self._requests: Counter[str] = Counter()
        self._stopwatch = Stopwatch()
        if jax.process_count() > 1:
            # All processes compute all requests together. This is how the harness knows such runs: each has a request
            # cache of its own (see `set_cache_hook`), and only the first one gets results.
            os.environ["LOCAL_RANK"] = str(jax.process_index())
        _logger.info("%s", self.memory_line())

    def see(self, prompts_of: int | None = None) -> None:
        """Changes how many tokens the model sees at once, and with it how its mode computes.

        Args:
          prompts_of: tokens that prompts have. They are seen whole, with what a chat template and an answer add, as far
            as the mode reaches, unless `max_length` was asked for. None goes back to what the model saw at first.

        Raises:
          ValueError: if it cannot see as much as it was asked to, or prompts of that length.
        """
        checkpoint = self.session.config
        length = self._asked_length or checkpoint.max_position_embeddings
        if prompts_of is not None:
            reach = self._asked_length or self._long_context.reach(checkpoint)
            if reach is not None and reach < prompts_of:
                mend = "raise max_length" if self._asked_length else "mode=yarn and mode=dca read longer ones"
                raise ValueError(f"the model sees {reach} tokens at once, its prompts have {prompts_of}; {mend}")
            whole = prompts_of + self.max_gen_toks
            length = whole if reach is None else min(whole, reach)
        config = self._long_context.configure(checkpoint, length)
        if config.max_length is not None and length > config.max_length:
            raise ValueError(
                f"max_length is {length}, the model has {config.max_length} positions; give at most so many, or "
                "a mode for longer inputs: mode=yarn or mode=dca"
            )
        self._max_length, self.config = length, config

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Takes the harness's request cache. Of several processes, which a kill stops at different requests, all get
        the first one's: they would leave out different requests otherwise, and wait for each other for good."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None and jax.process_count() > 1:
            _copy_first(cache_hook.dbdict)

    @property
    def _dtype(self) -> Any:
        return self.session.params["embed"]["embedding"].dtype

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

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # A continuation that does not fit is as probable as any other one of its length.
        chance = -math.log(self.config.vocab_size)
        results = [(len(continuation) * chance, False) for _, _, continuation in requests]
        fitting = [index for index, (*_, continuation) in enumerate(requests) if len(continuation) <= self.max_length]
        self._skip(
            {
                _name(self._asked[index]): f"the continuation has {len(requests[index][2])} tokens, more than the "
                f"{self.max_length} that the model sees at once; raise max_length"
                for index in sorted({*range(len(requests))} - {*fitting})
            },
            nothing_left=not fitting,
        )
        with self._measure("loglikelihood", len(requests)):
            scores = self._scorer.scores([requests[index][1:] for index in fitting])
            for place, score in _progress(scores, len(fitting), "loglikelihood", disable_tqdm):
                index = fitting[place]
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
        skipped = {}
        for index, request in enumerate(requests):
            prompt, sampling = self._prompt(*request.args)
            room = self.max_length - prompt.max_new_tokens
            if room < 1:
                skipped[_name(request)] = (
                    f"an answer of up to {prompt.max_new_tokens} tokens leaves no room for a prompt: the model sees "
                    f"{self.max_length}; lower max_gen_toks, or raise max_length"
                )
                continue
            self._truncated_prompts += len(prompt.tokens) > room
            by_sampling.setdefault(sampling, []).append((index, prompt._replace(tokens=prompt.tokens[-room:])))
        self._skip(skipped, nothing_left=not by_sampling)
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
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        return Prompt(tokens, most, tuple(stops)), self._sampling(given)

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

    @property
    def _scorer(self) -> Scorer:
        if self.max_length not in self._scorers:
            self._scorers[self.max_length] = Scorer(
                *(self.config, self.session.params),
                options=self.session.layer_options,
                max_length=self.max_length,
                max_rows=self._max_rows,
                multiple=self._split.rows,
                room=self._room,
            )
        return self._scorers[self.max_length]

    def _completer(self, sampling: Sampling) -> Completer:
        key = self.max_length, sampling
        if key not in self._completers:
            generation = self.session.generation
            self._completers[key] = Completer(
                *(self.config, self.session.params, self.session.tokenizer),
                eos_ids=tuple({*generation.eos_ids, self.eot_token_id}),
                pad_id=generation.pad_id,
                sampling=sampling,
                seed=self.session.options.seed,
                options=self.session.layer_options,
                max_rows=self._max_rows,
                multiple=self._split.rows,
                room=self._room,
            )
        return self._completers[key]

    def _skip(self, reasons: dict[str, str], nothing_left: bool) -> None:
        """Notes requests that cannot be computed: name and reason of each.

        Raises:
          ValueError: if there are no others.
        """
        if not reasons:
            return
        if nothing_left:
            raise ValueError(next(iter(reasons.values())))
        lines = [f"{name}: {reason}" for name, reason in reasons.items()]
        self.skipped += lines
        _logger.warning("%d samples could not be run: %s", len(lines), few(lines))

    @property
    def programs(self) -> int:
        """How many programs of the model were needed so far."""
        # The same model may see more or less of its input.
        scores = {(scorer.config, shape) for scorer in self._scorers.values() for shape in scorer.work.shapes}
        return len(scores) + 2 * sum(len(completer.work.programs) for completer in self._completers.values())

    def attention(self) -> dict[str, str]:
        """Which path attention takes in each program so far: of prompts, and of what follows them."""
        how = (self._dtype, self.session.layer_options, self.session.options.attention, self._split)
        taken = {}
        for scorer in self._scorers.values():
            for shape, sizes in scorer.work.shapes:
                program = f"scores, {sizes.prefixes} x {shape.prefix} and {sizes.rows} x {shape.suffix} tokens"
                taken[program] = _THEN.join(Paths(scorer.config, *how).scores(shape, sizes))
        for completer in self._completers.values():
            paths = Paths(completer.config, *how)
            for programs in completer.work.programs:
                (prefix, suffix, answer, _), sizes, *_ = programs
                begun = f"{sizes.prefixes} x {prefix} and " if prefix else ""
                program = f"answers, {begun}{sizes.rows} x {suffix} and {answer} tokens"
                taken[program] = _THEN.join(paths.completions(programs))
        return taken

    def usage(self) -> dict[str, Any]:
        """What the run took so far: requests and seconds of each kind, tokens, padding, programs. Compilation, which
        longer runs take no more of, is in none of the seconds but its own, and in no tokens per second."""
        scored = [scorer.work for scorer in self._scorers.values()]
        completed = [completer.work for completer in self._completers.values()]
        scoring = ("loglikelihood", "loglikelihood_rolling")
        given, computed, new = (
            sum(work.given for work in scored),
            sum(work.tokens for work in scored),
            sum(work.new_tokens for work in completed),
        )
        return {
            "requests": dict(self._requests),
            "seconds": {name: round(self._stopwatch.seconds[name], 3) for name in self._requests},
            "compile_seconds": round(self._stopwatch.seconds["compile"], 3),
            "programs": self.programs,
            "attention": self.attention(),
            "scored_tokens": given,
            "scored_tokens_computed": computed,
            "scored_tokens_per_second": self._stopwatch.rate(given, *scoring),
            "scored_tokens_computed_per_second": self._stopwatch.rate(computed, *scoring),
            "scoring_padding": _padding(computed, sum(work.slots for work in scored)),
            "new_tokens": new,
            "new_tokens_per_second": self._stopwatch.rate(new, "generate_until"),
            "prompt_padding": _padding(sum(work.tokens for work in completed), sum(work.slots for work in completed)),
            "truncated": sum(work.truncated for work in scored) + self._truncated_prompts,
            "answers_without_stop": sum(work.unstopped for work in completed),
            "skipped": len(self.skipped),
        }

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results file, which asks once all requests are through."""
        leaves = jax.tree.leaves(self.session.params)
        device = jax.devices()[0]
        return {
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": str(self._dtype),
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
        free = free_on_each(leaves[0].sharding.addressable_devices)
        activation, cache = slot_bytes(self.config, self._dtype, self.session.layer_options)
        return (
            f"memory per device: weights {held / 1e9:.2f} GB, free {free / 1e9:.2f} GB; each token of a batch takes "
            f"{activation / 1e3:.0f} kB while it is computed and {cache / 1e3:.1f} kB of keys and values; a batch has "
            f"up to {self._room.slots} tokens at once and {self._room.cached} in the cache"
        )

    def _measure(self, kind: str, requests: int) -> AbstractContextManager[None]:
        self._requests[kind] += requests
        return self._stopwatch.phase(kind)

    def _report(self) -> None:
        usage = self.usage()
        _logger.info("%s", usage_line(usage))
        if usage["truncated"]:
            _logger.warning(
                "%d inputs were longer than %d tokens and lost their beginning", usage["truncated"], self.max_length
            )


def usage_line(usage: Mapping[str, Any]) -> str:
    """What `Qwen2JaxLM.usage` says, for people."""
    rates = []
    if usage["scored_tokens_per_second"]:
        computed = f"{usage['scored_tokens_computed_per_second']:,.0f} computed"
        rates.append(f"{usage['scored_tokens_per_second']:,.0f} scored tokens/s ({computed})")
    if usage["new_tokens_per_second"]:
        rates.append(f"{usage['new_tokens_per_second']:,.0f} new tokens/s")
    paths = {path for of_program in usage["attention"].values() for path in of_program.split(_THEN)}
    counted = {
        "truncated": "inputs truncated",
        "answers_without_stop": "answers without a stop",
        "skipped": "samples not run",
    }
    return ", ".join(
        [
            *rates,
            f"besides {usage['compile_seconds']:.1f} s of compilation in {usage['programs']} programs",
            f"{max(usage['scoring_padding'], usage['prompt_padding']):.0%} padding",
            *([f"attention {' and '.join(sorted(paths))}"] if paths else []),
            *(f"{usage[name]} {what}" for name, what in counted.items() if usage[name]),
        ]
    )


def _padding(tokens: int, slots: int) -> float:
    return round(1 - tokens / slots, 4) if slots else 0.0


def _name(request: Instance) -> str:
    return f"{request.task_name}, document {request.doc_id}"


def _copy_first(answers: MutableMapping[str, Any]) -> None:
    """Makes the answers of every process those of the first one, which may have none of the others' files."""
    data = np.frombuffer(pickle.dumps(dict(answers.items())), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    first = np.asarray(multihost_utils.broadcast_one_to_all(np.resize(data, size)))
    if jax.process_index() != 0:
        answers.clear()
        answers.update(pickle.loads(first.tobytes()))


def _progress(results: Any, total: int, what: str, disabled: bool) -> Any:
    return tqdm(results, total=total, desc=what, disable=disabled or jax.process_index() != 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The harness's own command line, which now knows this model."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main()
