"""What `benchmarks.harness` asks of a model: requests as tasks of lm-evaluation-harness make them, of made-up words.

Words have the frequencies of a language and a vocabulary is made for them, so that texts have as many tokens for a
word as real ones. Everything follows from fixed seeds.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Mix:
    """How many requests there are, and their lengths in words."""

    subjects: int = 3
    questions: int = 12
    """Of each subject, of four letters each."""
    examples: int = 5
    """Before each question; of letters, the same for all of a subject, of endings, others for each question."""
    endings: int = 16
    """Questions with four endings each."""
    cloze: int = 64
    documents: int = 8
    longest: int = 2400
    """Words of a document at most."""
    answers: int = 64
    """Half of them of up to 64 tokens, half of up to 128."""
    scale: float = 1.0
    """Of the words of questions."""


SMALL = Mix()
TINY = Mix(subjects=1, questions=2, examples=2, endings=2, cloze=3, documents=2, longest=150, answers=4, scale=0.1)


def write_tokenizer(folder: Path, size: int) -> None:
    """Makes tokenizer.json of at most `size` ids, tokenizer_config.json and generation_config.json in a folder."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    writer = _Writer(0)
    backend.train_from_iterator((writer.words(200) for _ in range(2000)), trainer)
    backend.save(str(folder / "tokenizer.json"))
    end = backend.token_to_id(END_OF_TEXT)
    settings = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "pad_token_id": end}))


def requests(mix: Mix) -> dict[str, dict[str, Any]]:
    """For each part its "kind", a method of the harness's models, and the arguments of its requests."""
    writer = _Writer(1)
    words = writer.scaled(mix.scale)
    return {
        "multiple choice, letters": {"kind": "loglikelihood", "requests": _letters(words, mix)},
        "multiple choice, endings": {"kind": "loglikelihood", "requests": _endings(words, mix)},
        "cloze": {"kind": "loglikelihood", "requests": _cloze(words, mix)},
        "rolling windows": {
            "kind": "loglikelihood_rolling",
            "requests": [[words.between(mix.longest // 8, mix.longest, scaled=False)] for _ in range(mix.documents)],
        },
        "generation": {"kind": "generate_until", "requests": _answers(words, mix)},
    }


def _letters(words: "_Writer", mix: Mix) -> list[list[str]]:
    """As MMLU: the examples of a subject before each of its questions, the choices in the question."""

    def question() -> str:
        choices = "".join(f"\n{letter}. {words.between(3, 14)}" for letter in "ABCD")
        return f"{words.between(20, 70)}{choices}\nAnswer:"

    pairs = []
    for _ in range(mix.subjects):
        shots = "".join(f"{question()} {letter}\n\n" for letter in words.letters(mix.examples))
        for _ in range(mix.questions):
            context = f"The following are multiple choice questions about {words.between(1, 2)}.\n\n{shots}{question()}"
            pairs += [[context, f" {letter}"] for letter in "ABCD"]
    return pairs


def _endings(words: "_Writer", mix: Mix) -> list[list[str]]:
    """As HellaSwag with a few examples: they are drawn anew for each question, whose four endings share them."""
    pairs = []
    for _ in range(mix.endings):
        shots = "".join(f"{words.between(30, 60)} {words.between(10, 35)}\n\n" for _ in range(mix.examples))
        context = shots + words.between(30, 60)
        pairs += [[context, f" {words.between(10, 35)}"] for _ in range(4)]
    return pairs


def _cloze(words: "_Writer", mix: Mix) -> list[list[str]]:
    """As LAMBADA: one word after a passage that nothing else shares."""
    return [[words.between(55, 110), f" {words.between(1, 1)}"] for _ in range(mix.cloze)]


def _answers(words: "_Writer", mix: Mix) -> list[list[Any]]:
    """As GSM8K with a few examples, and as questions that want short answers with one."""
    arguments = [{"until": ["\n\n", "Question:"], "max_gen_toks": most, "do_sample": False} for most in (128, 64)]
    long = "".join(f"Question: {words.between(30, 60)}\nAnswer: {words.between(30, 80)}\n\n" for _ in range(3))
    short = f"Question: {words.between(8, 20)}\nAnswer: {words.between(2, 6)}\n\n"
    pairs = []
    for index in range(mix.answers):
        shots, span = ((long, (30, 60)), (short, (8, 20)))[index % 2]
        pairs.append([f"{shots}Question: {words.between(*span)}\nAnswer:", arguments[index % 2]])
    return pairs


class _Writer:
    """Draws words by Zipf's law from a fixed list."""

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)
        self._list = _word_list(30_000)
        weights = 1 / (np.arange(len(self._list)) + 2.7)
        self._weights = weights / weights.sum()
        self._scale = 1.0

    def scaled(self, scale: float) -> "_Writer":
        self._scale = scale
        return self

    def words(self, count: int) -> str:
        return " ".join(self._list[index] for index in self._random.choice(len(self._list), count, p=self._weights))

    def between(self, least: int, most: int, scaled: bool = True) -> str:
        count = int(self._random.integers(least, most + 1))
        return self.words(max(1, round(count * self._scale)) if scaled else count)

    def letters(self, count: int) -> Sequence[str]:
        return ["ABCD"[index] for index in self._random.integers(4, size=count)]


def _word_list(count: int) -> list[str]:
    """Different words of one to four syllables, the short ones first."""
    random = np.random.default_rng(2)
    syllables = [
        f"{start}{vowel}{end}" for start in "bcdfglmnprstvw" for vowel in "aeiou" for end in ("", "n", "r", "st")
    ]
    words: dict[str, None] = {}
    while len(words) < count:
        parts = 1 + min(3, int(np.log10(1 + len(words)) * 0.9))
        words["".join(random.choice(syllables, parts))] = None
    return list(words)
