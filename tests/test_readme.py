"""What the README and the pages in docs say about this repository is true of it."""

import dataclasses
import io
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import transformers

from convert import save_checkpoint
from convert.cli import Job
from qwen2_jax import sizes
from qwen2_jax.cli import JOBS, main
from qwen2_jax.command import parse
from qwen2_jax.commands import chat, evaluate, generate
from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import abstract_params, init_params
from qwen2_jax.sizes import PUBLISHED
from qwen2_jax.tokenizer import Tokenizer
from sharding import cli as plan
from tests.oracles.tokenizers import write_byte_tokenizer
from train.data import tokenize_job
from train.plot import Plot
from train.run_file import read_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TINY = Qwen2Config(
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=208,
)
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PACKAGES = ("qwen2_jax", "sharding", "convert", "train")


def parameters(config: Qwen2Config) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def active_parameters(config: Qwen2Config) -> int:
    """Those that one token meets: of the routed experts, only the chosen ones."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return parameters(config) - len(config.moe_layers) * (config.num_experts - config.num_experts_per_tok) * expert


def size_table() -> str:
    """The published models by shape: what differs otherwise (positions, epsilon, RoPE's base) costs no parameters."""
    by_shape: dict[Qwen2Config, list[str]] = {}
    for name, config in PUBLISHED.items():
        shape = dataclasses.replace(config, max_position_embeddings=1, rms_norm_eps=1e-6, rope_theta=1e6)
        by_shape.setdefault(shape, []).append(name)
    rows = ["| parameters | layers | width | heads | checkpoints |", "|---|---|---|---|---|"]
    for shape, names in by_shape.items():
        count = f"{parameters(shape) / 1e9:.2f} B"
        if shape.is_moe:
            count += f", {active_parameters(shape) / 1e9:.2f} B active"
        heads = f"{shape.num_attention_heads} / {shape.num_key_value_heads}"
        rows.append(f"| {count} | {shape.num_hidden_layers} | {shape.hidden_size} | {heads} | {', '.join(names)} |")
    return "\n".join(rows)


def test_sizes():
    table = size_table()
    assert table in README, f"the table of sizes should read\n{table}"


def test_every_file_is_in_the_map():
    listed, folder = set(), ""
    for line in README.splitlines():
        if match := re.match(r"(\w+/)+", line):
            folder = match[0]
        elif match := re.match(r"  (\S+\.py) {1,}\S", line):
            listed.add(folder + match[1])
    files = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert listed == {name for name in files if not name.endswith(("__init__.py", "__main__.py"))}


def test_jobs_exist():
    assert set(re.findall(r"qwen2-jax (\w+)", README)) == set(JOBS)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links and all((ROOT / link).exists() for link in links)


def commands(page: str) -> dict[str, str]:
    """Every line of a page that runs the command: its arguments, and what is piped into it ("" if nothing is)."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = itertools.chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks)
    return {line[2]: line[1] for text in lines if (line := re.match(r"(?:(printf .+) \| )?qwen2-jax (.+)", text))}


def write_run_files(page: str) -> None:
    """Every run file of a page, whose name stands in its first line, into the working directory."""
    for name, content in re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", page, re.DOTALL):
        Path(name).write_text(content)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, tmp_path, monkeypatch):
    """Every `qwen2-jax` line is one that the command understands, with the run files of its page beside it."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    write_run_files(text)
    options = {
        "convert": Job,
        "generate": generate.Options,
        "chat": chat.Options,
        "evaluate": evaluate.Job,
        "plan": plan.Options,
    }
    training = {"tokenize": tokenize_job.Options, "plot": Plot}
    assert commands(README)
    for line in commands(text):
        job, *argv = shlex.split(line, comments=True)
        try:
            if job != "train":
                parse(options[job], argv, prog=job)
            elif argv[0] == "pretrain":
                read_run(argv[1:])
            else:
                parse(training[argv[0]], argv[1:], prog=argv[0])
        except ValueError as error:
            pytest.fail(f"{line}: {error}")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder where every model that the README names is the same tiny one."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = write_byte_tokenizer(folder / "tokenizer", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    native, published, demo = folder / "native", folder / "Qwen" / "Qwen2-0.5B", folder / "build" / "demo" / "hf"
    save_checkpoint(native, TINY, init_params(TINY, jax.random.key(0)), tokenizer_from=tokenizer)
    for path in (published, demo):
        path.parent.mkdir(parents=True)
    assert main(["convert", "to-hf", str(native), str(published)]) == 0
    for link in (published.with_name("Qwen2-0.5B-Instruct"), demo):
        link.symlink_to(published)
    return folder


@pytest.fixture
def at_work(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("qwen2_jax.commands.generate.join", lambda options: True)  # too late: JAX is running here


def test_commands_run(at_work, monkeypatch, capsys):
    for line, source in commands(README).items():
        job, *argv = shlex.split(line, comments=True)
        if job in ("evaluate", "train"):
            continue  # their lengths are for real models; tests/qwen2_jax/evaluation and tests/train run them
        typed = subprocess.run(["sh", "-c", source], capture_output=True).stdout if source else b"hello\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        capsys.readouterr()
        assert main([job, *argv]) == 0, f"{line}: {capsys.readouterr().err}"
        assert capsys.readouterr().out.strip(), line


def test_the_program_of_the_data_runs(capsys):
    """With 10,000 documents instead of 10 million."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    assert program.count("10**7") == 2
    exec(compile(program.replace("10**7", "10**4"), "<data.md>", "exec"), {"__name__": "data"})
    assert float(capsys.readouterr().out) < 5


def test_the_small_model_of_ones_own(qwen_files, tmp_path, monkeypatch, capsys):
    """The recipe of docs/training.md, for two steps: transformers reads the tokenizer of what comes out as we do."""
    page = (ROOT / "docs" / "training.md").read_text()
    section = page[page.index("## A small model") : page.index("## Run files")]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert program.count('"Qwen/Qwen2-0.5B"') == 1
    monkeypatch.chdir(tmp_path)
    texts = [path.read_text() for path in (ROOT / "train").glob("*.py")]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    exec(compile(program.replace('"Qwen/Qwen2-0.5B"', repr(str(qwen_files))), "<training.md>", "exec"), {})
    monkeypatch.setattr("sharding.processes.join_processes", lambda *_: False)  # too late: JAX is running here
    tokenize, pretrain = map(shlex.split, commands(section))
    assert main(tokenize) == 0
    assert main([*pretrain, "--steps", "2", "--warmup", "1", "--seq", "64"]) == 0
    assert main(["convert", "to-hf", "runs/small/checkpoints/00000002", "hf"]) == 0
    assert "warning" not in capsys.readouterr().err
    ours, theirs = Tokenizer.from_folder("hf"), transformers.AutoTokenizer.from_pretrained("hf")
    for text in (*texts, "e\u0301 IT'S 123\r\n\n  x<|endoftext|>世界"):
        assert ours.encode(text) == theirs(text).input_ids
    config = json.loads(Path("hf/config.json").read_text())
    assert config["eos_token_id"] == theirs.convert_tokens_to_ids("<|endoftext|>") == 0


@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_programs_run(program, at_work, monkeypatch):
    monkeypatch.setattr(sizes, "published", lambda name: TINY)
    exec(compile(program, "<README.md>", "exec"), {"__name__": "readme"})
