"""Needles in haystacks: a fact with a random secret somewhere in a long prompt, and the question for it at the end.

Prompts have an exact number of tokens and depend on a seed alone, so every model, mode and batch gets the same ones.
"""

import dataclasses
import itertools
import random
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from qwen2_jax.tokenizer import Tokenizer

Task = Literal["needle", "multi-needle", "key-value"]
TASKS: tuple[Task, ...] = get_args(Task)

NEEDLES = 4
"""Of a multi-needle prompt, unless told otherwise."""

ANSWER_TOKENS = 32
"""Room for each secret in an answer: seven digits, and the words that a chat model puts around them."""

_LONGEST_LINE = 240  # characters; needles stand between lines, so these set how exactly a depth can be met

_CITIES = """
Accra Athens Bangkok Bogota Cairo Dakar Dublin Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon Manila
Melbourne Montreal Nairobi Oslo Prague Quito Riga Santiago Seoul Tbilisi Toronto Vienna Warsaw
""".split()


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: list[int]
    expected: tuple[str, ...]
    """The secrets that the answer should hold."""
    places: tuple[int, ...]
    """The index in `ids` at which each needle begins."""


class Haystack:
    """A text to hide needles in, line by line; lines longer than 240 characters are wrapped. It starts again at its end
    when a prompt is longer than it is.

    Raises:
      ValueError: if there is no text.
    """

    def __init__(self, text: str, tokenizer: Tokenizer):
        if not text.strip():
            raise ValueError("the haystack holds no text")
        self.text = text
        self._tokenizer = tokenizer
        # With the blank lines behind it, because a tokenizer may join line breaks.
        self._lines = re.findall(r"[^\n]*\n(?:[ \t]*\n)*", _wrapped(text.removesuffix("\n") + "\n"))
        self._ids: dict[int, list[int]] = {}

    def lines(self, random: random.Random) -> Iterator[list[int]]:
        """The ids of one line after the other, for ever, from a random one on."""
        for index in itertools.count(random.randrange(len(self._lines))):
            index %= len(self._lines)
            if index not in self._ids:
                self._ids[index] = self._tokenizer.encode(self._lines[index], control_tokens=False)
            yield self._ids[index]


@dataclasses.dataclass(frozen=True)
class Riddle:
    """The words of a prompt."""

    before: str
    """What comes first."""
    needles: Sequence[str]
    """Lines to hide in the filler."""
    question: str
    """What comes after the filler."""
    answer: str
    """How the answer is begun for a model that only continues text; a chat model does not get it."""
    expected: tuple[str, ...]
    """What a right answer holds."""
    filler: Iterator[Sequence[int]]
    """The ids of as many lines as are needed."""


def build_prompt(
    task: Task,
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    *,
    haystack: Haystack | None = None,
    seed: int | str = 0,
    needles: int = NEEDLES,
    chat: bool = False,
) -> Prompt:
    """A prompt of exactly `length` tokens.

    Args:
      task: "needle", one sentence with a secret number in a text; "multi-needle", several such sentences about the same
        city, all asked for; "key-value", one line of a long JSON object.
      tokenizer: of the model.
      length: tokens of the prompt; the answer comes on top.
      depth: where the needle stands, from 0, before the first line of the filler, to 1, after its last. Of several the
        first stands here and the others in even steps from there to the end.
      haystack: the filler; unused by "key-value", whose filler is random lines of the object.
      seed: of the secrets, the keys, and the line at which the haystack begins.
      needles: how many, for "multi-needle".
      chat: as a user's message in the checkpoint's chat template, instead of a text that the answer continues.

    Raises:
      ValueError: for an unknown task, a depth outside 0 to 1, no needles, or a length without room for the question.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    if needles < 1:
        raise ValueError(f"needles must be at least 1, got {needles}")
    dice = random.Random(str(seed))
    if task == "key-value":
        riddle = _key_value(dice, tokenizer)
    else:
        if haystack is None:
            raise ValueError(f"task {task} needs a haystack")
        riddle = _numbers(dice, haystack, needles if task == "multi-needle" else 1)
    return hide(riddle, tokenizer, length, depth, chat)


def hide(riddle: Riddle, tokenizer: Tokenizer, length: int, depth: float, chat: bool = False) -> Prompt:
    """A prompt of exactly `length` tokens with the words of one's own riddle.

    Lines stay whole, except the filler's last. Needles stand between two lines, as near to their depth as one can.

    Raises:
      ValueError: for a depth outside 0 to 1, or a length without room for the question.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"a depth must be from 0 (the beginning) to 1 (the end), got {depth}")
    before, after = _scaffolding(tokenizer, riddle, chat)
    lines = [tokenizer.encode(line, control_tokens=False) for line in riddle.needles]
    room = length - len(before) - len(after) - sum(map(len, lines))
    if room < 0:
        raise ValueError(f"{length} tokens are too few for this prompt: without any filler it has {length - room}")
    filler, borders = _filler(riddle.filler, room, tokenizer.encode("\n"))

    ids, places, taken = list(before), [], 0
    for number, line in enumerate(lines):
        target = (depth + (1 - depth) * number / len(lines)) * room
        border = min(borders, key=lambda place: abs(place - target))
        ids += filler[taken:border]
        places.append(len(ids))
        ids += line
        taken = border
    ids += filler[taken:] + after
    assert len(ids) == length
    return Prompt(ids, riddle.expected, tuple(places))


def score(expected: Sequence[str], answer: str) -> float:
    """The share of secrets that an answer holds, each standing alone and not inside a longer number."""
    found = [secret for secret in expected if re.search(rf"(?<!\d){re.escape(secret)}(?!\d)", answer)]
    return len(found) / len(expected)


def score_table(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean score of each mode, length and depth, in the order in which they first come.

    Args:
      samples: each with "mode", "length", "depth" and "score".

    Returns:
      For each cell "mode", "length", "depth", the mean "score", and "samples", how many it is of.
    """
    cells: dict[tuple[str, int, float], list[float]] = {}
    for sample in samples:
        cells.setdefault((sample["mode"], sample["length"], sample["depth"]), []).append(sample["score"])
    return [
        {"mode": mode, "length": length, "depth": depth, "score": sum(scores) / len(scores), "samples": len(scores)}
        for (mode, length, depth), scores in cells.items()
    ]


def _numbers(dice: random.Random, haystack: Haystack, count: int) -> Riddle:
    city, secrets = dice.choice(_CITIES), _secrets(dice, count, haystack.text)
    if count == 1:
        hidden, question = "A special magic number is", f"What is the special magic number for {city}"
        answer = f"The special magic number for {city} is"
    else:
        hidden, question = "Some special magic numbers are", f"What are all the special magic numbers for {city}"
        answer = f"The special magic numbers for {city} are"
    return Riddle(
        before=f"{hidden} hidden in the following text. Remember what it says: you will be asked for it.\n\n",
        needles=[f"The special magic number for {city} is {secret}.\n" for secret in secrets],
        question=f"{question} mentioned in the text?",
        answer=answer,
        expected=tuple(secrets),
        filler=haystack.lines(dice),
    )


def _key_value(dice: random.Random, tokenizer: Tokenizer) -> Riddle:
    key, (secret,) = f"{dice.getrandbits(32):08x}", _secrets(dice, 1)

    def lines() -> Iterator[list[int]]:
        while True:
            other, (value,) = f"{dice.getrandbits(32):08x}", _secrets(dice, 1)
            if other != key and value != secret:
                yield tokenizer.encode(_pair(other, value), control_tokens=False)

    return Riddle(
        before="Here is a JSON object of random keys and values. Remember them: you will be asked for one.\n\n{\n",
        needles=[_pair(key, secret)],
        question=f'}}\n\nWhat is the value of the key "{key}" in the object?',
        answer=f'The value of the key "{key}" is "',
        expected=(secret,),
        filler=lines(),
    )


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}",\n'


def _secrets(dice: random.Random, count: int, text: str = "") -> list[str]:
    """Different numbers of seven digits that do not stand in the text."""
    secrets: list[str] = []
    while len(secrets) < count:
        secret = str(dice.randrange(10**6, 10**7))
        if secret not in secrets and secret not in text:
            secrets.append(secret)
    return secrets


def _scaffolding(tokenizer: Tokenizer, riddle: Riddle, chat: bool) -> tuple[list[int], list[int]]:
    """The ids before the filler and after it."""
    if not chat:
        question = riddle.question and f"{riddle.question}\n"
        return tokenizer.encode(riddle.before), tokenizer.encode(question + riddle.answer)
    mark = "-- here stands the filler --"
    text = tokenizer.apply_chat_template([{"role": "user", "content": f"{riddle.before}{mark}{riddle.question}"}])
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError("the checkpoint's chat template does not write a user's message once, as it is")
    return tokenizer.encode(before), tokenizer.encode(after)


def _filler(lines: Iterator[Sequence[int]], room: int, newline: list[int]) -> tuple[list[int], list[int]]:
    """`room` ids of whole lines, the last one cut to fit, and the indices between lines, both ends included."""
    ids: list[int] = []
    borders = [0]
    while len(ids) < room:
        ids += next(lines)
        borders.append(min(len(ids), room))
    if len(ids) > room and room >= len(newline):
        ids[room - len(newline) :] = newline
    return ids[:room], borders


def _wrapped(text: str) -> str:
    return "\n".join(
        line if len(line) <= _LONGEST_LINE else textwrap.fill(line, _LONGEST_LINE, replace_whitespace=False)
        for line in text.split("\n")
    )
