"""`qwen2-jax generate`: continues prompts from the command line, a file or standard input."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from qwen2_jax.command import parse
from qwen2_jax.commands.processes import ProcessOptions, join, same_everywhere
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
    """Each line of the file or of standard input is a prompt. A blank line is refused, so that answers stay in step."""
    chat: bool = False
    """Each prompt is a user's message: put it into the checkpoint's chat template."""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Prompts that run at once."""
    json: bool = False
    """Print one JSON object: token ids, texts, seconds and tokens per second."""
    together: Annotated[ProcessOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ProcessOptions)


def main(argv: Sequence[str]) -> int:
    options: Options = parse(Options, argv, prog="qwen2-jax generate")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    texts = _prompts(options)
    session = Session(options.session)
    if options.chat:
        texts = [session.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    prompts = [session.encode(text) for text in texts]
    session.check(prompts)

    from sharding.processes import leave_processes

    first = join(options.together)
    if not same_everywhere(prompts):
        raise ValueError("the processes of this run have different prompts; give all of them the same --prompt-file")
    for piece in _printed(options, session, texts, prompts):
        if first:
            print(piece, end="", flush=True)
    leave_processes()
    return 0


def _printed(options: Options, session: Session, texts: list[str], prompts: list[list[int]]) -> Iterator[str]:
    """What the command prints, in pieces, as it is made."""
    if options.json:
        yield json.dumps(_report(session, texts, prompts, options.batch_size)) + "\n"
    elif len(prompts) == 1:
        yield from session.stream(prompts[0])
        yield "\n"
    else:
        for number, answer in enumerate(_answers(session, prompts, options.batch_size, Stopwatch()), start=1):
            yield f"--- {number} of {len(prompts)}\n{answer.text}\n"


def _prompts(options: Options) -> list[str]:
    if options.prompt:
        if options.prompt_file or options.lines:
            raise ValueError("--prompt is the whole prompt: it does not go with --prompt-file or --lines")
        prompts = list(options.prompt)
    else:
        if not options.prompt_file and sys.stdin.isatty():
            print("reading the prompt from standard input; Ctrl-D ends it", file=sys.stderr)
        source = options.prompt_file or "standard input"
        content = options.prompt_file.read_bytes() if options.prompt_file else sys.stdin.buffer.read()
        try:
            text = re.sub(r"\r?\n\Z", "", content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8: {error}") from error
        if options.lines and text:
            prompts = re.split(r"\r?\n", text)
            if blank := [str(number) for number, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
                raise ValueError(f"{source}: blank where a prompt should be, line {', '.join(blank)}; remove it")
        else:
            prompts = [text]
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
    for number, batch in enumerate(_batches(session, prompts, batch_size)):
        with stopwatch.phase("prefill"):
            run = session.start(batch, seed=number)
            start = run.advance(1)
        with stopwatch.phase("decode"):
            rest = run.advance()
        for prompt, *row in zip(batch, start.tolist(), rest.tolist(), strict=True):
            ids, ended = session.until_end([*row[0], *row[1]][: session.room(prompt)])
            yield _Answer(ids, session.tokenizer.decode(ids, control_tokens=False), ended)


def _batches(session: Session, prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[Sequence[int]]]:
    """Prompts in order, in batches that one configuration serves: their lengths may ask for different ones."""
    for _, group in itertools.groupby(prompts, session.config_for):
        alike = list(group)
        yield from (alike[first : first + size] for first in range(0, len(alike), size))


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
