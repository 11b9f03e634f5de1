"""What the README says about this repository is true of it."""

import dataclasses
import math
import re
import shlex
from pathlib import Path

import jax
import pytest

from convert.cli import Job
from qwen2_jax.cli import JOBS
from qwen2_jax.command import parse
from qwen2_jax.commands import chat, generate
from qwen2_jax.config import Qwen2Config
from qwen2_jax.model import abstract_params
from qwen2_jax.sizes import PUBLISHED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
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


def test_commands_parse():
    """Every `qwen2-jax` line of the README is one that the command understands."""
    options = {"convert": Job, "generate": generate.Options, "chat": chat.Options}
    lines = re.findall(r"^qwen2-jax (.+)$", README, re.MULTILINE)
    assert lines
    for line in lines:
        job, *argv = shlex.split(line, comments=True)
        try:
            parse(options[job], argv, prog=job)
        except ValueError as error:
            pytest.fail(f"{line}: {error}")
