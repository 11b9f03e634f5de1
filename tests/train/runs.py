"""A run in little, for the tests of training: a tokenizer of bytes, a model of some thousand parameters, rows that need
no files, and a loop that one can reach into."""

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.step_folder import read_manifest
from tests.oracles.tokenizers import write_byte_tokenizer
from train import IGNORE, training
from train.data.batches import Stream
from train.loop import Loop
from train.pretraining import Batch, Pretraining
from train.report.metrics_file import read_metrics
from train.run import Run
from train.run_file import read_run

SEQ, BATCH = 16, 8
MODEL = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
OPTIONS = f"""--seq {SEQ} --batch {BATCH} --steps 12 --warmup 2 --learning-rate 1e-2 --dtype float32 --remat none
--log-every 2 --save-every 4""".split()


def make_model(folder: Path) -> Path:
    """A folder with config.json and a tokenizer of a token per byte and one that ends documents."""
    write_byte_tokenizer(folder, ["<|endoftext|>"])
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


class RandomRows:
    """Two documents in a row, of tokens that follow from its number."""

    digest = "made up"

    def described(self, count: int) -> str:
        return f"{count} rows"

    def __init__(self, seq: int, seed: int = 0):
        self._seq, self._seed = seq, seed

    def __getitem__(self, index: int) -> Batch:
        seq = self._seq
        tokens = np.random.default_rng([self._seed, index]).integers(0, 256, seq, dtype=np.int32)
        tokens[seq // 2 :] = tokens[: seq - seq // 2]  # something to learn
        segments = np.repeat(np.array([1, 2], np.int32), (seq // 4, seq - seq // 4))
        positions = np.concatenate([np.arange(seq // 4), np.arange(seq - seq // 4)]).astype(np.int32)
        targets = np.roll(tokens, -1)
        targets[[seq // 4 - 1, seq - 1]] = IGNORE
        return Batch(tokens, targets, segments, positions)


@dataclasses.dataclass
class Seen:
    """What a loop did: the batches that it took, by step, and the state at its end."""

    status: int | None = None
    batches: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(step, number of the batch in its phase)."""


class Runner:
    """Runs of one model, in this process."""

    def __init__(self, model: Path, monkeypatch):
        self.model, self._patch = model, monkeypatch

    def run(self, out: Path, *flags: object) -> Run:
        given = map(str, ["--out", out, "--model", self.model, "--tokenizer", self.model, *OPTIONS, *flags])
        return read_run([*given])

    def __call__(
        self,
        out: Path,
        *flags: object,
        before: Callable[[int], None] = lambda step: None,
        rows: Callable[..., object] = lambda number, phase: RandomRows(phase.seq, number),
        validation: Callable[..., object] | None = None,
        objective: Pretraining = Pretraining(),
        run: Run | None = None,
    ) -> Seen:
        """Trains; `before` is called with the number of each step that is about to be taken."""
        run, seen = run or self.run(out, *flags), Seen()
        made, described, begun = training.make_train_step, training.abstract_state, training.init_state
        took, following = Loop._take_step, Stream.__next__
        last = [0]

        def next_batch(stream):
            last[0], batch = following(stream)
            return last[0], batch

        def take(loop, number, batch):
            before(loop._step + 1)
            seen.batches.append((loop._step + 1, last[0]))
            return took(loop, number, batch)

        def make_step(config, *others):
            return _Shared((config, others[1:], run.optimization, run.steps), lambda: made(config, *others))

        def abstract(config, optimizer, mesh, dtype):
            return _once((config, run.optimization, mesh), lambda: described(config, optimizer, mesh, dtype))

        def init(config, optimizer, key, mesh, dtype):
            """A copy, for a run uses it up."""
            what = (config, run.optimization, mesh, run.text.seed)
            state = _once(what, lambda: jax.device_get(begun(config, optimizer, key, mesh, dtype)))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(config, optimizer, mesh, dtype))
            return jax.device_put(state, shardings)

        with self._patch.context() as patch:
            patch.setattr(Loop, "_take_step", take)
            patch.setattr(Stream, "__next__", next_batch)
            patch.setattr(training, "make_train_step", make_step)
            patch.setattr(training, "abstract_state", abstract)
            patch.setattr(training, "init_state", init)
            try:
                seen.status = training.train(run, objective, rows, validation)
            finally:
                self.seen = seen
        return seen


_MADE: dict[Any, Any] = {}


def _once(key: Any, make: Callable[[], Any]) -> Any:
    """Equal runs share what takes long to make and does not change."""
    if key not in _MADE:
        _MADE[key] = make()
    return _MADE[key]


class _Shared:
    """A jitted step; equal ones are compiled once."""

    def __init__(self, key: Any, make: Callable[[], Any]):
        self._key, self._make = key, make

    def lower(self, state, batch):
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        return types.SimpleNamespace(
            compile=lambda: _once((self._key, shapes), lambda: self._make().lower(state, batch).compile())
        )


def digests(out: Path, step: int) -> dict[str, str]:
    """Of every array of a checkpoint: parameters, optimizer, guard, counters."""
    manifest = read_manifest(out / "checkpoints" / f"{step:08d}")
    return {name: stored.digest for name, stored in manifest.arrays.items()}


def curves(out: Path) -> dict[int, dict[str, float]]:
    """What metrics.jsonl says of each interval but for times."""
    timed = {"time", "seconds", "data_wait", "data_wait_share", "tokens_per_second", "eta", "tokens", "device_memory"}
    return {
        record["step"]: {name: value for name, value in record.items() if name not in timed}
        for record in read_metrics(out).steps
    }


def events(out: Path, name: str) -> list[dict[str, object]]:
    """All of a name, those that were superseded too."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == name]


class Crash(Exception):
    """Stands for whatever kills a process: nothing in the loop handles it."""


def crash_at(step: int) -> Callable[[int], None]:
    """For `before`."""

    def before(now: int) -> None:
        if now == step:
            raise Crash

    return before
