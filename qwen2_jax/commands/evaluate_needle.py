"""`qwen2-jax evaluate needle`: facts found again in long prompts, by length and depth."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from qwen2_jax.commands.evaluation import (
    EvaluationOptions,
    aligned,
    describe,
    open_journal,
    open_session,
    publish,
    shared_settings,
    text_digest,
)
from qwen2_jax.commands.session import Session
from qwen2_jax.evaluation.modes import reaching
from qwen2_jax.evaluation.texts import library_text, read_texts
from qwen2_jax.progress import count_progress

NAME = "needle"


@dataclasses.dataclass(frozen=True)
class Options:
    """Hide facts in long prompts, ask for them, and count the answers that hold them exactly.

    Writes FOLDER/needle.json (settings, every sample, the table) and FOLDER/needle.png (a heat map for each mode).
    """

    evaluation: EvaluationOptions
    lengths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")]
    """Tokens of the prompts. They may be more than the model declares positions."""
    depths: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X ...")] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the fact stands: 0 is the prompt's beginning, 1 its end."""
    task: Literal["needle", "multi-needle", "key-value"] = "needle"
    """One sentence in a text; several, all asked for; or one line of a long JSON object."""
    samples: int = 1
    """Prompts for each length and depth."""
    needles: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 4)")] = None
    """Sentences of a multi-needle prompt."""
    haystack: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="PATH ...", help_behavior_hint="(default: Python's language reference)")
    ] = ()
    """Text files to hide the sentences in."""
    chat: bool = False
    """Ask in the checkpoint's chat template, instead of beginning the answer."""
    max_new_tokens: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 32 for each fact)")
    ] = None
    """Most tokens of an answer."""
    prefill_chunk: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all at once)")] = None
    """Read prompts in pieces of N tokens, to bound the memory they take."""
    seed: int = 0
    """Of the facts, and of where the text begins. Every mode gets the same prompts."""


class _Cell(NamedTuple):
    mode: str
    length: int
    depth: float
    sample: int


def run(options: Options) -> int:
    _check(options)
    text = "" if options.task == "key-value" else read_texts(options.haystack) or library_text()
    session = open_session(options.evaluation)
    source = _Prompts(options, session, text)
    lengths, depths = sorted(set(options.lengths)), sorted(set(options.depths))
    for depth, sample in itertools.product(depths, range(options.samples)):
        source.prompt(_Cell("", lengths[0], depth, sample))  # refused, if at all, before anything has run
    long_contexts = options.evaluation.modes.long_contexts()
    room = source.room
    configs = {
        (mode, length): reaching(session.config, long_context, length + room)
        for mode, long_context in long_contexts.items()
        for length in lengths
    }
    settings = {
        **shared_settings(options.evaluation, session),
        "task": options.task,
        "lengths": lengths,
        "depths": depths,
        "samples": options.samples,
        "needles": source.needles,
        "haystack": [str(path) for path in options.haystack],
        "haystack_sha256": text_digest(text) if text else None,
        "chat": options.chat,
        "max_new_tokens": room,
        "seed": options.seed,
    }
    cells = [_Cell(*key, depth, i) for key in configs for depth in depths for i in range(options.samples)]
    with open_journal(NAME, options.evaluation, settings) as journal:
        done = _by_cell(journal.records)
        left = [cell for cell in cells if cell not in done]
        with count_progress("prompts", len(cells) - len(left), len(cells), quiet=options.evaluation.json) as update:
            for key, group in itertools.groupby(left, lambda cell: (cell.mode, cell.length)):
                alike, size = list(group), options.evaluation.batch_size
                for first in range(0, len(alike), size):
                    batch = alike[first : first + size]
                    journal.append(*source.ask(batch, configs[key]))
                    update(len(batch), "{}, {} tokens".format(*key))
        done = _by_cell(journal.records)
    _publish(options, session, settings, [done[cell] for cell in cells], configs)
    return 0


def _by_cell(records: Sequence[dict[str, Any]]) -> dict[_Cell, dict[str, Any]]:
    return {_Cell(*(record[name] for name in _Cell._fields)): record for record in records}


def _check(options: Options) -> None:
    options.evaluation.check()
    for flag, numbers in (("--lengths", options.lengths), ("--depths", options.depths)):
        if not numbers:
            raise ValueError(f"{flag} needs at least one number")
    for flag, smallest in (("--lengths", min(options.lengths)), ("--samples", options.samples)):
        if smallest < 1:
            raise ValueError(f"{flag} must be at least 1, got {smallest}")
    if outside := [depth for depth in options.depths if not 0 <= depth <= 1]:
        raise ValueError(f"--depths must be from 0 (the beginning) to 1 (the end), got {outside[0]}")
    if options.needles is not None and options.task != "multi-needle":
        raise ValueError(f"--needles means nothing in task {options.task}; it belongs to multi-needle")
    if options.needles is not None and options.needles < 1:
        raise ValueError(f"--needles must be at least 1, got {options.needles}")
    if options.haystack and options.task == "key-value":
        raise ValueError("--haystack means nothing in task key-value, which is made of random keys and values")
    for flag, number in (("--max-new-tokens", options.max_new_tokens), ("--prefill-chunk", options.prefill_chunk)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} must be at least 1, got {number}")


class _Prompts:
    """Builds the prompts of the run, has them answered, and scores the answers."""

    def __init__(self, options: Options, session: Session, text: str):
        from qwen2_jax.evaluation.needle import ANSWER_TOKENS, NEEDLES, Haystack

        self.options, self.session = options, session
        self.needles = (options.needles or NEEDLES) if options.task == "multi-needle" else 1
        self.room = options.max_new_tokens or ANSWER_TOKENS * self.needles
        self.haystack = Haystack(text, session.tokenizer) if text else None

    def prompt(self, cell: _Cell):
        from qwen2_jax.evaluation.needle import build_prompt

        return build_prompt(
            *(self.options.task, self.session.tokenizer, cell.length, cell.depth),
            haystack=self.haystack,
            seed=f"{self.options.seed} {cell.length} {cell.depth} {cell.sample}",  # not the mode: all get the same
            needles=self.needles,
            chat=self.options.chat,
        )

    def ask(self, cells: Sequence[_Cell], config: Any) -> list[dict[str, Any]]:
        from qwen2_jax.evaluation.needle import score
        from qwen2_jax.generation import generate

        prompts = [self.prompt(cell) for cell in cells]
        rows = generate(
            *(config, self.session.params, [prompt.ids for prompt in prompts]),
            max_new_tokens=self.room,
            eos_ids=self.session.generation.eos_ids,
            prefill_chunk=self.options.prefill_chunk,
            options=self.session.layer_options,
        )
        records = []
        for cell, prompt, row in zip(cells, prompts, rows.tolist(), strict=True):
            answer = self.session.tokenizer.decode(self.session.until_end(row)[0], control_tokens=False)
            records.append(
                {
                    **cell._asdict(),
                    "prompt_tokens": len(prompt.ids),
                    "places": list(prompt.places),
                    "expected": list(prompt.expected),
                    "answer": answer,
                    "score": score(prompt.expected, answer),
                }
            )
        return records


def _publish(options: Options, session: Session, settings: dict, samples: list[dict], configs: dict) -> None:
    from qwen2_jax.evaluation.needle import score_table
    from qwen2_jax.evaluation.plots import plot_needle

    table = score_table(samples)
    report = {
        "settings": settings,
        "trained_length": options.evaluation.modes.trained(session.config),
        "configurations": [describe(mode, length, config) for (mode, length), config in configs.items()],
        "table": table,
        "samples": samples,
    }
    parts = [f"{options.task}: share of secrets found, by prompt length and depth"]
    for mode, rows in itertools.groupby(table, lambda row: row["mode"]):
        lines = [[mode, *(f"{depth:g}" for depth in settings["depths"]), "mean"]]
        for length, of_length in itertools.groupby(rows, lambda row: row["length"]):
            scores = [row["score"] for row in of_length]
            lines.append([str(length), *(f"{score:.2f}" for score in (*scores, sum(scores) / len(scores)))])
        parts.append(aligned(lines))
    publish(NAME, options.evaluation, report, plot_needle, "\n\n".join(parts))
