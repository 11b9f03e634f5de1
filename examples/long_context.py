"""Trains a small Qwen2 on windows of 256 bytes, then reads 4096 with it in every long-context mode.

`python examples/long_context.py` takes minutes on a CPU, writes a checkpoint, the numbers and the plots into
build/long-context, and is what docs/long-context.md shows. A finished training is not repeated.
"""

import dataclasses
import functools
import itertools
import json
import random
import string
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro

from convert import load_checkpoint, save_checkpoint
from qwen2_jax import generate
from qwen2_jax.config import Qwen2Config
from qwen2_jax.evaluation.modes import reaching
from qwen2_jax.evaluation.needle import Haystack, Riddle, hide, score, score_table
from qwen2_jax.evaluation.perplexity import bucket_means, loss_by_position, loss_table
from qwen2_jax.evaluation.plots import plot_needle, plot_perplexity
from qwen2_jax.long_context import LongContext
from qwen2_jax.model import Params, Qwen2, init_params
from qwen2_jax.tokenizer import Tokenizer
from train import IGNORE, next_token_loss

TRAINED = 256
LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

CONFIG = Qwen2Config(
    vocab_size=259,  # the bytes and three control tokens
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=TRAINED,
    # The slowest dimensions turn as little within the trained length as those of Qwen2, with 1e6 and 32,768.
    rope_theta=1e6 * TRAINED / 32768,
    tie_word_embeddings=True,
    initializer_range=0.09,  # 1 / sqrt(hidden_size)
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

MODES = {
    "plain": LongContext("plain"),
    "yarn, factor 16": LongContext("yarn", yarn_factor=16.0),
    "yarn, factor by length": LongContext("yarn", yarn_factor="auto"),
    "dca": LongContext("dca"),
    "dca-temperature": LongContext("dca-temperature"),
    "dca-yarn": LongContext("dca-yarn", yarn_factor="auto"),
}
TRUNCATED = "the last 128 to 255 bytes"
"""What the trained length can do: a text read in windows of 256 that overlap by half."""

TOKENS = 2048
"""Of a training batch."""
SHORT = 64
"""Length of the windows at first: among few places the model soon finds out how to look something up."""
SHORT_SHARE = 0.55
LEARNING_RATE = 8e-3
WARM_UP = 100
MIXTURES = (
    {"text": 0.2, "needle": 0.1, "pairs": 0.2, "copy": 0.5},
    {"text": 0.5, "needle": 0.2, "pairs": 0.15, "copy": 0.15},
)

BUCKET = 64
ANSWER = 5

SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "lib2to3"}
HELD_OUT_EVERY = 16


def library_sources() -> tuple[list[str], list[str]]:
    """The standard library's modules, for training and held out: no tests, no tables, no Python 2 grammar."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts)]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY], texts[::HELD_OUT_EVERY]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: the id of a byte is its value."""
    folder.mkdir(parents=True, exist_ok=True)
    # GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on, in order.
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    characters = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in CONTROL_TOKENS])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": CONTROL_TOKENS[0]}) + "\n")


def random_line(dice: random.Random) -> tuple[str, str]:
    """A line that looks like one of the library's, in two parts: the question and the answer."""
    return "".join(dice.choices(string.ascii_lowercase, k=4)) + " = ", "".join(dice.choices(string.digits, k=4)) + "\n"


class Windows:
    """Endless training windows.

    Many are text. The others teach to look things up: lines `name = number` scattered in text, of which some come
    again; nothing but such lines; and random bytes that repeat. There, what nobody could know does not count.
    """

    def __init__(self, texts: list[str], seed: int = 0):
        self.library = "\n".join(texts).encode()
        self.dice = random.Random(seed)

    def batch(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, both [TOKENS / length, length] int32."""
        mixture = MIXTURES[0 if length == SHORT else 1]
        kinds = self.dice.choices(list(mixture), list(mixture.values()), k=TOKENS // length)
        rows = [getattr(self, kind)(length + 1) for kind in kinds]
        tokens = np.asarray([list(b"".join(piece for piece, _ in row)[: length + 1]) for row in rows], np.int32)
        counted = [list(itertools.chain(*([known] * len(piece) for piece, known in row)))[: length + 1] for row in rows]
        return tokens[:, :-1], np.where(counted, tokens, IGNORE)[:, 1:]

    # Each gives at least `length` bytes, in pieces, and of each whether it counts.

    def text(self, length: int) -> list[tuple[bytes, bool]]:
        start = self.dice.randrange(len(self.library) - length)
        return [(self.library[start : start + length], True)]

    def needle(self, length: int) -> list[tuple[bytes, bool]]:
        lines = [self._line() for _ in range(self.dice.randint(1, max(1, length // 40)))]
        again = self.dice.sample(lines, self.dice.randint(1, len(lines)))
        places = len(lines) + len(again)
        [(text, _)] = self.text(length - places * len(b"\n".join(lines[0])))
        cuts = [0, *sorted(self.dice.randint(0, len(text)) for _ in range(places)), len(text)]
        pieces = [(text[: cuts[1]], True)]
        for i, (question, answer) in enumerate(lines + again):
            pieces += [(b"\n" + question, False), (answer, i >= len(lines)), (text[cuts[i + 1] : cuts[i + 2]], True)]
        return pieces

    def pairs(self, length: int) -> list[tuple[bytes, bool]]:
        lines = [self._line() for _ in range(self.dice.randint(1, length // 20))]
        again = self.dice.choices(lines, k=length // 12)
        pieces = [(b"".join(line), False) for line in lines]
        return pieces + [part for question, answer in again for part in ((question, False), (answer, True))]

    def copy(self, length: int) -> list[tuple[bytes, bool]]:
        period = self.dice.randint(4, length // 2)
        piece = "".join(self.dice.choices(string.ascii_lowercase + string.digits, k=period)).encode()
        return [(piece, False), (piece * (length // period), True)]

    def _line(self) -> tuple[bytes, bytes]:
        question, answer = random_line(self.dice)
        return question.encode(), answer.encode()


def matrices(params: Params) -> Params:
    """Which axes of which parameters make a matrix, for Muon; Adam updates the others."""

    def axes(path, leaf):
        *_, parent, name = (key.key for key in path)
        outputs = {2: 1, 3: 1 if parent == "o" else 2}
        if name != "kernel":
            return None
        split = outputs[leaf.ndim]
        return optax.contrib.MuonDimensionNumbers(tuple(range(split, leaf.ndim)), tuple(range(split)))

    return jax.tree_util.tree_map_with_path(axes, params)


def train(config: Qwen2Config, texts: list[str], steps: int) -> Params:
    """The parameters after so many batches."""
    params = init_params(config, jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, min(WARM_UP, steps // 2), steps, LEARNING_RATE / 20)
    optimizer = optax.contrib.muon(
        schedule, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=matrices
    )
    state = optimizer.init(params)
    model = Qwen2(config, dtype=jnp.bfloat16)  # the arithmetic; the weights stay float32

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, targets):
        def loss(params):
            return next_token_loss(config, model.apply({"params": params}, tokens), targets).total

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    windows = Windows(texts)
    began, losses = time.perf_counter(), []
    for count in range(1, steps + 1):
        length = SHORT if count <= SHORT_SHARE * steps else TRAINED
        params, state, loss = step(params, state, *windows.batch(length))
        losses.append(loss)
        if count % 100 == 0 or count == steps:
            print(f"step {count}: loss {np.mean(losses):.3f}, {time.perf_counter() - began:.0f} s", flush=True)
            losses.clear()
    return params


def request_losses(config: Qwen2Config, params: Params, mode: LongContext, windows: np.ndarray) -> np.ndarray:
    """[B, T - 1] losses; each position is computed as in a request of the next of LENGTHS."""
    passes = {}
    for length in LENGTHS:
        passes[dataclasses.replace(reaching(config, mode, length), max_position_embeddings=LENGTHS[-1])] = length
    losses, first = [], 0
    for configured, length in passes.items():  # one, unless the mode follows the length
        losses.append(loss_by_position(configured, params, windows[:, :length])[:, first:])
        first = length - 1
    return np.concatenate(losses, axis=1)


def truncated_losses(config: Qwen2Config, params: Params, windows: np.ndarray) -> np.ndarray:
    """[B, T - 1] losses of a model that sees only the last TRAINED / 2 to TRAINED - 1 bytes."""
    half = TRAINED // 2
    pieces = np.lib.stride_tricks.sliding_window_view(windows, TRAINED, axis=1)[:, ::half]
    losses = loss_by_position(config, params, pieces.reshape(-1, TRAINED)).reshape(*pieces.shape[:2], -1)
    return np.concatenate([losses[:, 0, : half - 1], losses[:, :, half - 1 :].reshape(len(windows), -1)], axis=1)


def measure_loss(config: Qwen2Config, params: Params, texts: list[str], count: int) -> list[dict]:
    """The table of loss by position over `count` windows, none of which crosses from one file into another."""
    longest = LENGTHS[-1]
    files = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
    whole = np.concatenate([file[: len(file) // longest * longest].reshape(-1, longest) for file in files])
    windows = whole[np.arange(count) * len(whole) // count]
    readers = {name: functools.partial(request_losses, config, params, mode) for name, mode in MODES.items()}
    readers[TRUNCATED] = functools.partial(truncated_losses, config, params)
    means = {}
    for name, read in readers.items():
        began = time.perf_counter()
        means[name] = np.concatenate([bucket_means(read(row[None]), BUCKET) for row in windows])
        print(f"loss by position, {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return loss_table(means, BUCKET, LENGTHS[-1] - 1)


def measure_retrieval(
    config: Qwen2Config, params: Params, tokenizer: Tokenizer, filler: Callable[[random.Random], Iterator], count: int
) -> list[dict]:
    """The table of how often the answer to a random line, hidden in filler, is found."""
    samples = []
    for (name, mode), length in itertools.product(MODES.items(), LENGTHS):
        configured = reaching(config, mode, length)
        for depth in DEPTHS:
            prompts = []
            for sample in range(count):
                dice = random.Random(f"{length} {depth} {sample}")  # the same prompts for every mode
                question, answer = random_line(dice)
                riddle = Riddle("", [question + answer], "", question, (answer.strip(),), filler(dice))
                prompts.append(hide(riddle, tokenizer, length - ANSWER, depth))
            answers = generate(configured, params, [prompt.ids for prompt in prompts], max_new_tokens=ANSWER)
            for prompt, ids in zip(prompts, answers.tolist(), strict=True):
                found = score(prompt.expected, tokenizer.decode(ids).partition("\n")[0])
                samples.append({"mode": name, "length": length, "depth": depth, "score": found})
    return score_table(samples)


def main(out: Path = Path("build/long-context"), steps: int = 4400, windows: int = 16, samples: int = 8) -> None:
    """
    Args:
      out: folder of the checkpoint, the numbers and the plots.
      steps: of training, unless the folder holds a checkpoint already.
      windows: of held-out text, of 4096 bytes each.
      samples: prompts for each length and depth.
    """
    training, held_out = library_sources()
    folder = out / "model"
    if not folder.exists():
        write_tokenizer(out / "tokenizer")
        params = train(CONFIG, training, steps)
        save_checkpoint(folder, CONFIG, params, tokenizer_from=out / "tokenizer")
    config, params = load_checkpoint(folder)
    tokenizer = Tokenizer.from_folder(folder)

    text = Haystack("\n".join(held_out), tokenizer)

    def lines(dice: random.Random) -> Iterator[list[int]]:
        while True:
            yield tokenizer.encode("".join(random_line(dice)))

    measurements = {
        "loss": lambda: measure_loss(config, params, held_out, windows),
        "needle": lambda: measure_retrieval(config, params, tokenizer, text.lines, samples),
        "pairs": lambda: measure_retrieval(config, params, tokenizer, lines, samples),
    }
    for name, measure in measurements.items():
        settings = {"model": f"trained on {TRAINED} bytes", "task": name, "steps": steps, "windows": windows}
        report = {"settings": settings | {"samples": samples}, "trained_length": TRAINED, "table": measure()}
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        if name == "loss":  # the plot has colours for six lines; the numbers of all seven are in the file
            shown = [row for row in report["table"] if row["mode"] != "dca-yarn"]
            plot_perplexity(report | {"table": shown}, out / "loss.png")
        else:
            plot_needle(report, out / f"{name}.png")


if __name__ == "__main__":
    tyro.cli(main)
