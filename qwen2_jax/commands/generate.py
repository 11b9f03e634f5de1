"""`qwen2-jax generate`: continues prompts from the command line, a file or standard input."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen2_jax.command import parse
from qwen2_jax.commands.session import Session, SessionOptions
from qwen2_jax.commands.stopwatch import Stopwatch


@dataclasses.dataclass(frozen=True)
class Options:
    """Continue prompts: those of --prompt, else the text of --prompt-file, else standard input."""

    session: SessionOptions
    prompt: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT", help_behavior_hint="")
    ] = ()
    """Text to continue; give it several times for a batch."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Text to continue, less a newline at its end."""
    lines: bool = False
    """Each line of the file or of standard input is a prompt."""
    chat: bool = False
    """Each prompt is a user's message: put it into the checkpoint's chat template."""
    batch_size: int = 8
    """Prompts that run at once."""
    json: bool = False
    """Print one JSON object: token ids, texts, seconds and tokens per second."""


def main(argv: Sequence[str]) -> int:
    options: Options = parse(Options, argv, prog="qwen2-jax generate")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    texts = _prompts(options)
    session = Session(options.session)
    if options.chat:
        texts = [session.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    prompts = [session.tokenizer.encode(text) for text in texts]
    session.check(prompts)

    if options.json:
        print(json.dumps(_report(session, texts, prompts, options.batch_size)))
    elif len(prompts) == 1:
        for piece in session.stream(prompts[0]):
            print(piece, end="", flush=True)
        print()
    else:
        for number, answer in enumerate(_answers(session, prompts, options.batch_size, Stopwatch()), start=1):
            print(f"--- {number} of {len(prompts)}\n{answer.text}", flush=True)
    return 0


def _prompts(options: Options) -> list[str]:
    if options.prompt:
        if options.prompt_file or options.lines:
            raise ValueError("--prompt is the whole prompt: it does not go with --prompt-file or --lines")
        prompts = list(options.prompt)
    else:
        source = options.prompt_file or "standard input"
        try:
            text = options.prompt_file.read_bytes() if options.prompt_file else sys.stdin.buffer.read()
            prompt = text.decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8: {error}") from error
        prompts = prompt.split("\n") if options.lines else [prompt]
    if empty := [str(number) for number, prompt in enumerate(prompts, start=1) if not prompt]:
        which = f"prompt {', '.join(empty)} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        raise ValueError(f"{which} is empty; a model continues at least one token")
    return prompts


@dataclasses.dataclass(frozen=True)
class _Answer:
    ids: list[int]
    text: str
    ended: bool
    """Whether the model ended it, rather than the limit of new tokens."""


def _answers(
    session: Session, prompts: Sequence[Sequence[int]], batch_size: int, stopwatch: Stopwatch
) -> Iterator[_Answer]:
    for number, first in enumerate(range(0, len(prompts), batch_size)):
        with stopwatch.phase("prefill"):
            run = session.start(prompts[first : first + batch_size], seed=number)
            start = run.advance(1)
        with stopwatch.phase("decode"):
            rest = run.advance()
        for row in zip(start.tolist(), rest.tolist(), strict=True):
            ids, ended = session.until_end([*row[0], *row[1]])
            yield _Answer(ids, session.tokenizer.decode(ids, control_tokens=False), ended)


def _report(session: Session, texts: list[str], prompts: list[list[int]], batch_size: int) -> dict[str, Any]:
    stopwatch = Stopwatch()
    with stopwatch.phase("load"):
        _ = session.params
    answers = list(_answers(session, prompts, batch_size, stopwatch))
    tokens = {
        "prefill": sum(map(len, prompts)),
        "decode": sum(len(answer.ids) - 1 for answer in answers),  # the first one comes out of the prefill
    }
    return {
        "model": session.options.model,
        "prompts": [
            {"prompt": text, "prompt_ids": ids, **dataclasses.asdict(answer)}
            for text, ids, answer in zip(texts, prompts, answers, strict=True)
        ],
        "seconds": {phase: round(seconds, 6) for phase, seconds in stopwatch.seconds.items()},
        "tokens": tokens,
        "tokens_per_second": {phase: round(tokens[phase] / stopwatch.seconds[phase], 3) for phase in tokens},
    }
