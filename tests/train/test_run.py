"""Run files and flags: which option comes from where, and what is said of wrong ones."""

import contextlib
import dataclasses
import io
import re

import pytest
import yaml

from train.cli import main
from train.run import Phase, Run
from train.run_file import as_options, presets, read_run


@pytest.fixture
def write(tmp_path):
    """write(text) -> the path of a run file with it."""

    def file(text: str) -> str:
        path = tmp_path / "some run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return file


FILE = """
model: qwen2-0.5b
data: [books, "my code"]
weights: [0.7, 0.3]
learning_rate: 1e-4     # a text, for YAML
z_loss: 0.0001
tensorboard: true
no_plan: false
keep_every: null
profile: [3, 5]
steps: 7
"""


def test_flags_only():
    run = read_run(["--out", "runs/a", "--data", "a", "b", "--seq", "128", "--mesh", "data=2,fsdp=-1"])
    assert (str(run.out), run.text.data, run.text.seq, run.compute.mesh) == (
        "runs/a",
        ("a", "b"),
        128,
        "data=2,fsdp=-1",
    )
    assert run.steps == Run().optimization.steps == 1000
    assert run.stretches == (Phase(1000, 128, 8, 1, None, ("a", "b"), ()),)


@pytest.mark.parametrize(
    ("flags", "steps"), [("", 100), ("--steps 100", 10), ("--steps 9", 0), ("--steps 90000", 100), ("--warmup 7", 7)]
)
def test_no_run_is_all_warm_up(flags, steps):
    assert read_run(["--out", "runs/a", *flags.split()]).warm_up == steps


def test_a_file(write):
    run = read_run([write(FILE), "--out", "x"])
    assert run.start.model == "qwen2-0.5b"
    assert run.text.data == ("books", "my code") and run.text.weights == (0.7, 0.3)
    assert run.optimization.learning_rate == 1e-4 and run.optimization.z_loss == 1e-4
    assert run.output.tensorboard and not run.compute.no_plan
    assert run.output.profile == (3, 5) and run.safety.keep_every is None
    rest = read_run(["--out", "x"])
    assert run.compute == rest.compute and run.safety == rest.safety


def test_flags_prevail_over_the_file_and_the_file_over_defaults(write):
    run = read_run([write(FILE), "--learning-rate", "1e-5", "--data", "other", "--weights", "1", "--out", "x"])
    assert run.optimization.learning_rate == 1e-5 and run.optimization.steps == 7
    assert run.text.data == ("other",) and run.text.weights == (1.0,)


def test_what_to_start_from_is_said_once(write):
    """A file names a model; flags may begin with a checkpoint instead."""
    start = read_run([write(FILE), "--init", "runs/a"]).start
    assert (start.init, start.model) == ("runs/a", None)
    start = read_run([write("init: there"), "--model=qwen2-7b"]).start
    assert (start.init, start.model) == (None, "qwen2-7b")


PHASES = """
seq: 64
batch: 16
data: [a]
weights: [2]
phases:
  - {steps: 10, rope_theta: 10000}
  - {steps: 5, seq: 512, batch: 2, accumulate: 2, rope_theta: 1e6, data: [b, c]}
"""


def test_phases(write):
    run = read_run([write(PHASES), "--seq", "128"])
    assert run.stretches == (
        Phase(10, 128, 16, 1, 10000.0, ("a",), (2.0,)),
        Phase(5, 512, 2, 2, 1e6, ("b", "c"), ()),
    )
    assert run.steps == 15


@pytest.mark.parametrize("text", [FILE, PHASES])
def test_the_options_of_a_run_are_a_run_file(text, write, tmp_path):
    run = read_run([write(text), "--out", str(tmp_path), "--profile", "1", "2", "--spikes", "6"])
    again = read_run([write(yaml.safe_dump(as_options(run)))])
    assert dataclasses.replace(again, file=None) == dataclasses.replace(run, file=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"some run.yaml: there is no option learning_rat; did you mean learning_rate"),
        ("wholly_unknown: 1", r"there is no option wholly_unknown; see qwen2-jax train pretrain --help"),
        ("steps: many", r"--steps: invalid literal for int\(\) with base 10: 'many'"),
        ("schedule: linear", "invalid choice .linear. for argument .--schedule."),
        ("steps: {a: 1}", r"steps must be a value or a list, got a table"),
        ("steps: false", r"run.yaml: steps must be a value; a word such as yes needs quotes, got False"),
        ("schedule: yes", r"run.yaml: schedule must be a value; a word such as yes needs quotes, got True"),
        ("json: 'no'", r"run.yaml: json must be true or false, got 'no'"),
        ("learning_rate: [1.0e-3, 1.0e-4]", r"run.yaml: learning_rate must be one value, got \[0.001, 0.0001\]"),
        ("steps: 2\nseed: 1\nsteps: 4", r"run.yaml is not YAML: steps given twice"),
        ("out: 2025-02-30", r"run.yaml is not YAML: day is out of range"),
        ("steps: 3000000000", r"--steps must be below 2\*\*31, got 3000000000"),
        ("seed: 18446744073709551616", r"--seed must be below 2\*\*31"),
        ("learning_rate: 1.0e+300", r"--learning-rate must fit into float32"),
        ("epsilon: 1.0e-60", r"--epsilon must fit into float32"),
        ("steps: 0", r"--steps must be 1 or more, got 0$"),
        ("[1, 2]", "holds no options; a run file has lines such as"),
        ("", "holds no options"),
        ("a: [", "is not YAML"),
        ("phases: [{seq: 3}]", r"phase 1 must have steps, and may have steps, seq, batch"),
        ("phases: [{steps: 3}, 7]", r"phase 2 must have steps.*got 7"),
        ("phases: [{steps: 3, sek: 1}]", r"phase 1 has an option sek that no phase has; did you mean seq"),
        ("phases: [{steps: x}]", r"phase 1: .*--steps.*'x'"),
        ("phases: [{steps: 0}]", r"phase 1: --steps must be 1 or more, got 0$"),
        ("phases: [{steps: 3, seq: 0}]", r"phase 1: --seq must be 2 or more, got 0$"),
        ("phases: [{steps: 3, rope_theta: 0}]", r"phase 1: --rope-theta must be more than 0, got 0.0$"),
        (
            "steps: 3\nphases: [{steps: 3}]",
            "lists phases, which have steps of their own; --steps does not go",
        ),
        ("phases: 3", r"phases is a list of tables"),
        ("phases: {steps: 3}", r"phases is a list of tables"),
    ],
)
def test_wrong_files(text, message, write):
    with pytest.raises(ValueError, match=message):
        read_run([write(text)])


def test_folders_at_home(write, monkeypatch):
    """No shell replaces the ~ of a file."""
    monkeypatch.setenv("HOME", "/home/me")
    run = read_run([write("out: ~/runs/a\ncache: ~/tokens\ncompilation_cache: ~/programs")])
    assert (str(run.out), str(run.text.cache)) == ("/home/me/runs/a", "/home/me/tokens")
    assert run.compute.compilation_cache == "/home/me/programs"
    run = read_run(["--out=~/b", "--compilation-cache", "gs://bucket/programs"])
    assert str(run.out) == "/home/me/b" and run.text.cache is None
    assert run.compute.compilation_cache == "gs://bucket/programs"
    with pytest.raises(ValueError, match="~nobody-here/a: there is no such user"):
        read_run(["--out", "~nobody-here/a"])


@pytest.mark.parametrize("out", ["gs://bucket/run", "s3://bucket/run"])
def test_a_run_needs_a_folder(out, write):
    message = f"--out {out}: a run needs a folder that all its processes see; mount the bucket"
    for argv in (["--out", out], [write(f"out: {out}")]):
        with pytest.raises(ValueError, match=message):
            read_run(argv)


def test_files_that_are_not_there():
    with pytest.raises(ValueError, match="qwen2-7b-v5p is neither a run file .* nor a preset; .* qwen2-7b-v5p-4x4x4"):
        read_run(["qwen2-7b-v5p"])
    with pytest.raises(OSError, match="none.yaml"):
        read_run(["none.yaml"])
    with pytest.raises(ValueError, match="a run file comes first, as in qwen2-jax train pretrain some.yaml --out RUN"):
        read_run(["--out", "x", "some.yaml"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps must be 1 or more, got 0"),
        ("--seq 1", "--seq must be 2 or more, got 1"),
        ("--batch -8", "--batch must be 1 or more, got -8"),
        ("--accumulate 0", "--accumulate must be 1 or more, got 0"),
        ("--seed -1", "--seed must be 0 or more, got -1"),
        ("--max-bad-records -1", "--max-bad-records must be 0 or more, got -1"),
        ("--warmup -1", "--warmup must be 0 or more, got -1"),
        ("--decay 10", "--decay is for --schedule wsd, got --schedule cosine"),
        ("--learning-rate 0", "--learning-rate must be more than 0, got 0.0"),
        ("--learning-rate nan", "--learning-rate must be more than 0, got nan"),
        ("--weight-decay -1", "--weight-decay must be 0 or more, got -1.0"),
        ("--clip-norm inf", "--clip-norm must be 0 or more, got inf"),
        ("--beta2 1", "--beta2 is a share, from 0 to 1, got 1.0"),
        ("--final-rate 2", "--final-rate is a share, from 0 to 1, got 2.0"),
        ("--capacity-factor 0", "--capacity-factor must be more than 0, got 0.0"),
        ("--save-every 0", "--save-every must be 1 or more, got 0"),
        ("--keep-last 0", "--keep-last must be 1 or more, got 0"),
        ("--keep-every 0", "--keep-every must be 1 or more, got 0"),
        (
            "--keep-every 1200 --save-every 500",
            "--keep-every 1200 is no multiple of --save-every 500, so that not all of those steps are saved; change "
            "either, as to --keep-every 1500",
        ),
        (
            "--keep-every 250",  # beside the default
            "--keep-every 250 is no multiple of --save-every 500, so that not all of those steps are saved; change "
            "either, as to --keep-every 500",
        ),
        ("--max-skips 0", "--max-skips must be 1 or more, got 0"),
        ("--max-rollbacks -1", "--max-rollbacks must be 0 or more, got -1"),
        ("--spikes 0", "--spikes must be more than 0, got 0.0"),
        ("--resume yes", "--resume is auto, never, or the number of a step, got 'yes'"),
        ("--log-every 0", "--log-every must be 1 or more, got 0"),
        ("--profile 5 3", "--profile is the first step to trace, from 1, and the last one, got 5 3"),
        ("--profile 0 3", "--profile is the first step to trace, from 1, and the last one, got 0 3"),
        ("--learnin-rate 1", "Unrecognized options: --learnin-rate, 1; perhaps you meant --learning-rate"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    assert main(["pretrain", *flags.split()]) == 2
    assert capsys.readouterr().err == f"qwen2-jax: error: {message}\n"


def test_processes_part_when_all_are_through(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr("sharding.processes.join_processes", lambda *_: done.append("join"))
    monkeypatch.setattr("train.training.train", lambda *_: done.append("train") or 75)
    monkeypatch.setattr("sharding.processes.leave_processes", lambda: done.append("leave"))
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--data", "text"]) == 75
    assert done == ["join", "train", "leave"]


def test_help_explains_every_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    told = {}
    for line in printed.getvalue().splitlines():
        if found := re.match(r"[│ ] --([a-z][a-z0-9-]*)( \S+( LAST)?)?(.*)", line):
            name = found[1]
            told[name] = found[4].strip("│ ")
        elif told:
            told[name] += f" {line.strip('│ ')}"
    assert told.keys() == {name.replace("_", "-") for name in as_options(Run())} - {"phases"}
    for name, text in told.items():
        assert re.match(r" *[A-Z][\w',: ]{6,}.*\((default|required)", text), f"{name}: {text}"


def test_presets_are_named():
    assert len(presets()) == 5 and all(re.fullmatch(r"qwen2-[\w.-]+-v\d\w-\d+x\d+(x\d+)?", name) for name in presets())
