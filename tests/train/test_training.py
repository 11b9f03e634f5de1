"""Runs that are stopped and gone on with end as those that are not, bit by bit; what does not serve is refused."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from convert import folder as folders
from convert.load import load_checkpoint
from convert.step_folder import read_manifest
from qwen2_jax.command import exit_code
from tests.train.runs import BATCH, OPTIONS, Crash, RandomRows, Runner, crash_at, curves, digests, events
from train import training
from train.checkpoints import Checkpoints
from train.data.store import TokenStore
from train.loop import Loop
from train.pretraining import Pretraining
from train.run import Phase
from train.run_folder import locked
from train.stopping import STOPPED
from train.text import rows_of_text, validation_rows_of_text
from train.training import tokenizer_of, train


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The folder of a whole run, and what it did."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        return folder, Runner(model, patch)(folder)


def assert_equal_runs(folder, other, step=12):
    """Every bit of parameters, optimizer, guard and counters; every curve."""
    assert digests(folder, step) == digests(other, step)
    assert curves(folder) == curves(other)


def test_a_run(undisturbed):
    folder, seen = undisturbed
    assert seen.status == 0
    assert seen.batches == [(step, step - 1) for step in range(1, 13)]
    losses = [record["loss"] for record in curves(folder).values()]
    assert sorted(curves(folder)) == [2, 4, 6, 8, 10, 12] and losses[-1] < losses[0]
    rates = [record["learning_rate"] for record in curves(folder).values()]
    assert rates[0] == np.float32(1e-2) and rates == sorted(rates, reverse=True)
    assert [event["step"] for event in events(folder, "checkpoint")] == [0, 4, 8, 12]
    assert [event["step"] for event in events(folder, "finished")] == [12]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["00000004", "00000008", "00000012"]


def test_the_folder_says_what_it_was(undisturbed, model):
    folder, _ = undisturbed
    (start,) = map(json.loads, (folder / "starts.jsonl").read_text().splitlines())
    assert start["step"] == 0 and start["changes"] == []
    assert start["versions"]["jax"] == jax.__version__ and start["devices"] == "8 x cpu"
    config, params = load_checkpoint(str(folder / "checkpoints" / "00000012"))
    assert config.hidden_size == 32 and params["norm"]["scale"].shape == (32,)
    assert (folder / "checkpoints/00000012/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("stop", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 9, 12))])
def test_a_crash_at_any_step(stop, train_run, undisturbed, tmp_path):
    """maxtext#2824: weights were resumed, and the data began anew."""
    folder, whole = undisturbed
    with pytest.raises(Crash):
        train_run(tmp_path / "run", before=crash_at(stop))
    first = train_run.seen.batches
    seen = train_run(tmp_path / "run")
    assert seen.batches[0][0] == (stop - 1) // 4 * 4 + 1  # no more than an interval is lost
    assert {**dict(first), **dict(seen.batches)} == dict(whole.batches)  # and no batch is taken twice, or left out
    assert [step for step, _ in seen.batches] == [*range(seen.batches[0][0], 13)]
    assert_equal_runs(tmp_path / "run", folder)


def test_a_crash_under_accumulation(train_run, tmp_path):
    """tunix#2290: a resume counted iterations instead of what they had consumed, and data was left out."""
    flags = ("--batch", 2 * BATCH, "--accumulate", 2)
    whole = train_run(tmp_path / "whole", *flags)
    assert whole.batches == [(step, step - 1) for step in range(1, 13)]
    with pytest.raises(Crash):
        train_run(tmp_path / "run", *flags, before=crash_at(7))
    seen = train_run(tmp_path / "run", *flags)
    assert train_run.seen.batches == whole.batches[4:] == seen.batches
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal(number, train_run, undisturbed, tmp_path):
    """What the step that was under way came to is saved: nothing is done twice."""
    folder, whole = undisturbed
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    stopped = train_run(tmp_path / "run", before=lambda step: os.kill(os.getpid(), number) if step == 7 else None)
    assert stopped.status == STOPPED == 75
    assert handlers == [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    (event,) = events(tmp_path / "run", "stopped")
    assert (event["step"], event["next"]) == (7, "it is saved; the same command goes on from it")
    seen = train_run(tmp_path / "run")
    assert stopped.batches + seen.batches == whole.batches
    assert_equal_runs(tmp_path / "run", folder)


def test_moments_and_rate_go_on(train_run, tmp_path):
    """A resume that loses them looks plausible (Automodel#763 of NVIDIA-NeMo lost the moments, KempnerForge#115 the
    rate): so the state that a run begins with is looked at."""
    train_run(tmp_path / "run", before=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 7 else None)
    with pytest.raises(Crash):
        train_run(tmp_path / "run", before=crash_at(8))
    assert [event["step"] for event in events(tmp_path / "run", "start")] == [0, 7]
    manifest = read_manifest(tmp_path / "run/checkpoints/00000007")
    assert manifest.arrays["optimizer.3.updates"].shape == ()
    begun_with = []

    def look(loop):
        begun_with.append(jax.device_get(loop._state))
        raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Loop, "run", look)
        train_run(tmp_path / "run")
    (state,) = begun_with
    assert state.step == 7 and state.guard.accepted == 7
    assert state.optimizer[1].count == 7 and state.optimizer[3].updates == 7
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer[1].nu))


def test_another_mesh(train_run, undisturbed, tmp_path):
    folder, whole = undisturbed
    with pytest.raises(Crash):
        train_run(tmp_path / "run", before=crash_at(7))
    seen = train_run(tmp_path / "run", "--mesh", "data=2,fsdp=2,tensor=2")
    assert seen.batches == whole.batches[4:]
    (changed,) = events(tmp_path / "run", "options")
    assert changed["changed"] == "mesh: fsdp=-1 -> data=2,fsdp=2,tensor=2"
    for step, record in curves(folder).items():
        other = curves(tmp_path / "run")[step]
        for name in ("loss", "cross_entropy", "learning_rate"):
            np.testing.assert_allclose(other[name], record[name], rtol=1e-6)


@pytest.mark.parametrize("seen", [[], [4], [4, 8, 12]])
def test_the_first_process_says_which_steps_are_there(seen, monkeypatch):
    """A disk over a network may show others something else; they would begin elsewhere."""

    def of(steps):
        return training._steps(types.SimpleNamespace(steps=lambda: steps))

    def replay(given):
        said = told.pop(0)
        assert (given.shape, given.dtype) == (said.shape, said.dtype)
        return said

    told = []
    monkeypatch.setattr(training.multihost_utils, "broadcast_one_to_all", lambda given: told.append(given) or given)
    assert of([4, 8]) == [4, 8]
    monkeypatch.setattr(training.multihost_utils, "broadcast_one_to_all", replay)
    assert of(seen) == [4, 8] and not told


def test_resume_never(train_run, undisturbed, tmp_path):
    """orbax#527: a run from step 0 in an old folder did not save its early steps, and did not say so."""
    folder, _ = undisturbed
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with pytest.raises(ValueError, match="holds step 12 of a run already; choose another --out, or --resume auto"):
        train_run(folder, "--resume", "never")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    assert train_run(tmp_path / "new", "--resume", "never").status == 0


def test_resume_an_earlier_step(train_run, undisturbed, tmp_path):
    """What came after it is set aside by the first save, and the run becomes the same again."""
    folder, whole = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint of step 5 to resume from; there are: 4, 8, 12$"):
        train_run(tmp_path / "run", "--resume", 5)
    with pytest.raises(Crash):  # before anything new is saved, nothing is lost
        train_run(tmp_path / "run", "--resume", 4, before=crash_at(6))
    assert read_manifest(tmp_path / "run/checkpoints/00000012").step == 12
    stopped = train_run(
        tmp_path / "run",
        *("--resume", 4),
        before=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None,
    )
    assert stopped.status == STOPPED and stopped.batches == whole.batches[4:6]
    seen = train_run(tmp_path / "run")
    assert seen.batches == whole.batches[6:]
    assert_equal_runs(tmp_path / "run", folder)


def test_a_run_that_is_complete(train_run, undisturbed, capsys, tmp_path):
    folder, _ = undisturbed
    lines = (folder / "metrics.jsonl").read_text()
    seen = train_run(folder)
    assert seen.status == 0 and not seen.batches
    assert capsys.readouterr().out == f"{folder} is complete: step 12 of 12 is saved, and was read back\n"
    assert train_run(folder, "--json").status == 0
    assert json.loads(capsys.readouterr().out) == {"event": "finished", "step": 12}
    assert (folder / "metrics.jsonl").read_text() == lines
    with pytest.raises(ValueError, match="is at step 12 already, and asked for are 10 in all"):
        train_run(folder, "--steps", 10)


def test_a_model_that_changed_under_the_same_name_is_told(train_run, model, undisturbed, tmp_path):
    """The arrays of a checkpoint fit a model of another rope base as well."""
    copy, other = tmp_path / "run", tmp_path / "model"
    shutil.copytree(undisturbed[0], copy)
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    train_run(copy, "--model", other, "--steps", 13)
    (told,) = events(copy, "options")
    assert "rope_theta in config.json: 10000.0 -> 500.0" in told["changed"]
    (_, start) = map(json.loads, (copy / "starts.jsonl").read_text().splitlines())
    assert "rope_theta in config.json: 10000.0 -> 500.0" in start["changes"]


def test_a_damaged_checkpoint_is_not_gone_on_from(train_run, undisturbed, tmp_path):
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    flip_a_bit(tmp_path / "run/checkpoints/00000012")
    with pytest.raises(ValueError, match=r"step 12: .* is damaged.*--resume 8$"):
        train_run(tmp_path / "run", "--steps", 14)


def test_one_run_at_a_time(train_run, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="another process trains into"):
        train_run(tmp_path / "run")
    assert train_run(tmp_path / "run").status == 0  # the lock was given back


# What cannot be written.


def fill_the_disk(folder):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limit[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def take_the_folder_away(folder):
    """Root may write into any folder, so that it takes more than permissions."""
    (folder / "checkpoints").rename(folder / "aside")
    (folder / "checkpoints").write_text("")

    def back():
        (folder / "checkpoints").unlink()
        (folder / "aside").rename(folder / "checkpoints")

    return back


@pytest.mark.parametrize("trouble", [fill_the_disk, take_the_folder_away])
@pytest.mark.parametrize(("at", "lost"), [(6, 8), (12, 12)])
def test_what_cannot_be_saved(at, lost, trouble, train_run, undisturbed, tmp_path, capsys):
    """The run ends within an interval, be it the last, with one line, and goes on from the checkpoint before.

    orbax#605: the run went on as if nothing had happened. keras#23609: a run whose last save failed was a success.
    """
    folder = tmp_path / "run"
    with contextlib.ExitStack() as later:

        def before(step):
            if step == at:
                Checkpoints.wait(later.run)
                later.callback(trouble(folder))

        original = Loop.__init__

        def init(loop, *arguments, **named):
            original(loop, *arguments, **named)
            later.run = loop._checkpoints

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "__init__", init)
            assert exit_code(lambda: train_run(folder, before=before).status) == 2
    assert lost <= train_run.seen.batches[-1][0] <= 12 and not events(folder, "finished")
    message = capsys.readouterr().err
    assert message.startswith("qwen2-jax: error: ") and message.count("\n") == 1
    assert f"step {lost} could not be saved in" in message or "checkpoints: Not a directory" in message
    assert train_run(folder).batches[0] == (lost - 3, lost - 4)
    assert_equal_runs(folder, undisturbed[0])


def flip_a_bit(step):
    """Of the largest file with numbers."""
    array = max(step.rglob("c/*/*"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 4
    array.write_bytes(content)


def test_a_last_save_that_does_not_read_back(train_run, tmp_path, capsys, monkeypatch):
    verify = Checkpoints.verify

    def verify_what_the_disk_made_of_it(checkpoints, step):
        flip_a_bit(tmp_path / f"run/checkpoints/{step:08d}")
        verify(checkpoints, step)

    monkeypatch.setattr(Checkpoints, "verify", verify_what_the_disk_made_of_it)
    assert exit_code(lambda: train_run(tmp_path / "run").status) == 2
    message = capsys.readouterr().err
    assert message.startswith("qwen2-jax: error: step 12: ") and message.count("\n") == 1
    assert " is damaged" in message and message.endswith("--resume 8\n")
    assert not events(tmp_path / "run", "finished")


def test_a_folder_that_cannot_be_made(train_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        train_run(tmp_path / "file" / "run")


# Bad input.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model= --init=", "name the model by --model"),
        ("--init {model}", "name the model by --model .* or by --init .*, not by both"),
        ("--model qwen3-1b", "qwen3-1b is no folder with a config.json; published models are"),
        ("--tokenizer /nowhere", "there is no folder /nowhere; for a model of the Hugging Face hub write owner/name"),
        ("--tokenizer {folder}", "holds no tokenizer; --tokenizer names a folder with tokenizer.json, or a hub id"),
        ("--batch 12 --accumulate 5", "a batch of 12 rows does not divide into 5 parts"),
        ("--batch 12", "a batch of 12 rows does not divide over data x fsdp x expert = 8"),
        ("--mesh context=8 --batch 1 --seq 24", "24 tokens do not divide over context=8"),
        ("--mesh dta=8", "unknown mesh axis 'dta'"),
        ("--mesh data=3", "mesh data=3 is 3 devices, but there are 8"),
        ("--mesh tensor=-1,data=-1", "only one axis of a mesh can take what is left"),
        ("--seq 128", "the model has positions for 64 tokens, and rows would have 128; give --seq 64 or less"),
        ("--warmup 13", "a warm-up of 13 steps does not fit into a run of 12 steps; give --warmup 12 or less"),
        ("--schedule wsd --warmup 10 --decay 5", "a warm-up of 10 .* a decay of 5 .* give --warmup 7 or less, or a sh"),
        ("--attention nonesuch", "nonesuch"),
        ("--moe tiled", "--moe and --capacity-factor are for a mixture of experts, and this model is dense"),
        ("--capacity-factor 2", "--moe and --capacity-factor are for a mixture of experts, and this model is dense"),
        ("--profile 13 14", "--profile begins with step 13, and the run has 12"),
        ("--compilation-cache programs", "--compilation-cache does not work with several CPU devices"),
        ("--resume 3", "has no checkpoint of step 3 to resume from; there are: none"),
    ],
)
def test_refuses_before_compiling(flags, message, train_run, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("of a model")  # which a checkpoint would carry along
    flags = flags.format(model=train_run.model, folder=tmp_path).split()
    run = train_run.run(tmp_path / "run", *flags)
    if flags[0] == "--model=":
        run = dataclasses.replace(run, start=dataclasses.replace(run.start, model=None, init=None))
    monkeypatch.setattr(Loop, "_program", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=message):
        train(run, Pretraining(), lambda number, phase: RandomRows(phase.seq))
    assert not (tmp_path / "run").exists(), "a start that was refused leaves nothing"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "name the model by --model .* got neither"),
        ("--init /nowhere/model", "/nowhere/model"),
        ("--init {out}/checkpoints/00000099", "00000099"),
    ],
)
def test_refuses_what_to_start_from(flags, message, train_run, undisturbed):
    folder, _ = undisturbed
    run = train_run.run("run", *flags.format(out=folder).split())
    run = dataclasses.replace(run, start=dataclasses.replace(run.start, model=None))
    with pytest.raises((ValueError, OSError), match=message):
        train(run, Pretraining(), lambda number, phase: RandomRows(phase.seq))


def test_begins_with_the_weights_of_another_run(train_run, undisturbed, tmp_path):
    """--init takes the parameters of a step, and its tokenizer; optimizer and counters begin anew."""
    folder, _ = undisturbed
    run = train_run.run(tmp_path / "run", "--save-every", 12)
    start = dataclasses.replace(run.start, model=None, init=str(folder / "checkpoints/00000012"), tokenizer=None)
    with pytest.raises(Crash):
        train_run(tmp_path / "run", run=dataclasses.replace(run, start=start), before=crash_at(1))
    ours, theirs = digests(tmp_path / "run", 0), digests(folder, 12)
    same = {name for name in ours if ours[name] == theirs[name]}
    assert {name for name in ours if name.startswith("params.")} <= same
    assert not any(name in same for name in ours if name.startswith("optimizer.1.mu"))
    assert (tmp_path / "run/checkpoints/00000000/tokenizer.json").exists()


def test_a_tokenizer_of_the_hub(train_run, tmp_path, monkeypatch):
    """Downloaded, without the weights beside it; and that of --init where none is named."""
    asked = []

    def download(name, weights):
        asked.append((name, weights))
        return train_run.model

    monkeypatch.setattr(folders, "_downloaded", download)
    run = train_run.run(tmp_path / "run", "--tokenizer", "Qwen/Qwen2-0.5B")
    assert tokenizer_of(run) == train_run.model
    start = dataclasses.replace(run.start, tokenizer=None, model=None, init="Qwen/Qwen2-1.5B")
    assert tokenizer_of(dataclasses.replace(run, start=start)) == train_run.model
    assert asked == [("Qwen/Qwen2-0.5B", "none"), ("Qwen/Qwen2-1.5B", "none")]
    beside = dataclasses.replace(start, init=None, model=str(train_run.model))
    assert tokenizer_of(dataclasses.replace(run, start=beside)) == train_run.model
    for model in (None, "qwen2-0.5b", str(tmp_path)):
        nowhere = dataclasses.replace(start, init=None, model=model)
        with pytest.raises(ValueError, match="--tokenizer is missing: name a folder with tokenizer.json, or a hub id"):
            tokenizer_of(dataclasses.replace(run, start=nowhere))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--data is missing: name folders of tokens, or text"),
        ("--data a b --weights 1", "--weights has 1 numbers for the 2 of --data; give one for each"),
        ("--data {parent}", "run lies in .*, all of which is read"),
        ("--data {parent}/a.txt --validation-data {parent}", "run lies in .*, all of which is read"),
    ],
)
def test_refuses_without_data(flags, message, train_run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run = train_run.run(tmp_path / "run", *flags.format(parent=tmp_path).split())
        rows_of_text(run), validation_rows_of_text(run)
    assert not (tmp_path / "run").exists()


def test_text_becomes_rows(train_run, model, tmp_path):
    """Phases begin with different documents, weights and all; what was tokenized is found again."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{number} " for number in range(500)))
    run = train_run.run(tmp_path / "run", "--data", tmp_path / "a.txt", tmp_path / "b.txt", "--weights", 3, 1)
    (phase,) = run.stretches
    rows = rows_of_text(run)(0, phase)
    texts = [bytes(rows[index].tokens.astype(np.uint8)) for index in range(40)]
    assert len(list((tmp_path / "run/tokens").iterdir())) == 2
    assert rows[0].tokens.shape == (phase.seq,) and len(set(texts)) > 20
    again = rows_of_text(run)(0, phase)
    assert all(np.array_equal(again[index].tokens, rows[index].tokens) for index in range(40))
    other = rows_of_text(run)(1, phase)
    assert any(not np.array_equal(other[index].tokens, rows[index].tokens) for index in range(40))

    stores = sorted((tmp_path / "run/tokens").iterdir())
    shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    run = train_run.run(tmp_path / "run", "--data", stores[0], "--weights", 1, "--tokenizer", tmp_path / "other")
    with pytest.raises(ValueError, match="holds tokens of another tokenizer than"):
        rows_of_text(run)(0, run.stretches[0])


def test_a_flipped_token_is_found(train_run, tmp_path, monkeypatch):
    """At the start, once per store, however many phases it has; unless somebody would rather not wait."""
    (tmp_path / "a.txt").write_text("again and again " * 50)
    run = train_run.run(tmp_path / "run", "--data", tmp_path / "a.txt", "--validation-data", tmp_path / "a.txt")
    rows_of_text(run)(0, run.stretches[0])
    (folder,) = (tmp_path / "run/tokens").iterdir()
    content = bytearray((folder / "tokens-000000.bin").read_bytes())
    content[40] ^= 1
    (folder / "tokens-000000.bin").write_bytes(content)
    damaged = r"tokens-000000.bin is damaged: its sha256 differs .*; tokenize again"
    with pytest.raises(ValueError, match=damaged):
        rows_of_text(run)(0, run.stretches[0])
    with pytest.raises(ValueError, match=damaged):
        validation_rows_of_text(run)(run.stretches[0])
    trusting = dataclasses.replace(run, text=dataclasses.replace(run.text, no_verify_data=True))
    rows_of_text(trusting)(0, run.stretches[0])
    read = []
    monkeypatch.setattr(TokenStore, "damages", lambda store, *share: read.append(share) or [])
    rows_of = rows_of_text(run)
    for number in range(3):
        rows_of(number, run.stretches[0])
    assert read == [(0, 1)]


def test_damaged_records_are_named(train_run, tmp_path, capsys, monkeypatch):
    """As `train tokenize` does; by one process, and by every start, for it is what the run learns from."""
    lines = [*('{"text": "again and again"}' for _ in range(100)), *("broken" for _ in range(5))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run = train_run.run(tmp_path / "run", "--data", tmp_path / "a.jsonl")
    for process in (0, 0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows_of_text(run)(0, run.stretches[0])
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(told) == (4 if process == 0 else 0)
        for line, number in zip(told, (101, 102, 103), strict=False):
            assert line.startswith(f"qwen2-jax: warning: skipped {tmp_path}/a.jsonl, line {number}: not JSON")
        assert not told or "skipped 2 more bad records (see " in told[-1]
    run = train_run.run(tmp_path / "run", "--data", tmp_path / "a.jsonl", "--max-bad-records", 4)
    run = dataclasses.replace(run, text=dataclasses.replace(run.text, cache=tmp_path / "other"))
    with pytest.raises(ValueError, match="5 bad records, more than the 4 that --max-bad-records allows"):
        rows_of_text(run)(0, run.stretches[0])


def test_the_end_of_generation_is_that_of_documents(train_run, model, tmp_path, capsys):
    """transformers generates without an end where config.json names none."""
    config = json.loads((model / "config.json").read_text())
    ends = []
    for given in ({}, {"eos_token_id": None}, {"eos_token_id": 7}):
        folder = shutil.copytree(model, tmp_path / f"model{len(ends)}")
        (folder / "config.json").write_text(json.dumps(config | given))
        with pytest.raises(Crash):
            train_run(tmp_path / f"run{len(ends)}", "--model", folder, before=crash_at(1))
        saved = json.loads((tmp_path / f"run{len(ends)}/checkpoints/00000000/config.json").read_text())
        assert saved == config | {"torch_dtype": "float32", "eos_token_id": saved["eos_token_id"]}
        ends.append(saved["eos_token_id"])
    assert ends == [256, 256, 7]
    assert "warning" not in capsys.readouterr().err


def test_warns_of_a_tokenizer_that_transformers_would_change(train_run, model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Crash):
        train_run(tmp_path / "run", "--tokenizer", folder, before=crash_at(1))
    error = capsys.readouterr().err
    assert error.startswith("qwen2-jax: warning: ") and error.count("\n") == 1
    assert f"{folder}: the tokenizer does not split text as Qwen2's does; transformers will" in error


def test_needs_a_folder(train_run):
    run = dataclasses.replace(train_run.run("x"), out=None)
    with pytest.raises(ValueError, match="--out is missing"):
        train(run, Pretraining(), lambda number, phase: RandomRows(phase.seq))


@pytest.mark.slow
def test_programs_are_kept(model, tmp_path):
    """On one device: the second start finds what the first has compiled."""
    (tmp_path / "a.txt").write_text("again and again " * 50)
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # of a small model
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
    }
    said = []
    for name in "ab":
        flags = "--out", tmp_path / name, "--model", model, "--tokenizer", model, "--data", tmp_path / "a.txt", *OPTIONS
        command = [sys.executable, "-m", "train", "pretrain", *flags, "--compilation-cache", tmp_path / "programs"]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append("Persistent compilation cache hit for 'jit_step'" in done.stderr)
        assert any((tmp_path / "programs").iterdir())
    assert said == [False, True] and digests(tmp_path / "a", 12) == digests(tmp_path / "b", 12)


# Phases.


def phased(train_run, folder):
    run = train_run.run(folder, "--save-every", 2)
    return dataclasses.replace(run, phases=(Phase(8), Phase(4, seq=32, batch=8, accumulate=1, rope_theta=1e6)))


def test_phases(train_run, tmp_path):
    """Longer rows and another rope base, in a run whose optimizer and schedule go on."""
    folder = tmp_path / "whole"
    seen = train_run(folder, run=phased(train_run, folder))
    assert seen.batches == [(step, step - 1) for step in range(1, 9)] + [(step, step - 9) for step in range(9, 13)]
    configs = {step: json.loads((folder / f"checkpoints/{step:08d}/config.json").read_text()) for step in (8, 10, 12)}
    assert [_base(config) for config in configs.values()] == [1e4, 1e6, 1e6]
    rates = [record["learning_rate"] for record in curves(folder).values()]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2e-2
    assert len(events(folder, "compiled")) == 2

    for stop, saved in ((9, 8), (12, 10)):  # behind the last step of the first phase, and within the second
        with pytest.raises(Crash):
            train_run(other := tmp_path / f"run{stop}", run=phased(train_run, other), before=crash_at(stop))
        again = train_run(other, run=phased(train_run, other))
        assert again.batches == seen.batches[saved:]
        assert digests(other, 12) == digests(folder, 12)


def _base(config):
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
