"""`qwen2-jax plan`: answers without JAX, refuses what cannot be, and says what would do instead."""

import json
import subprocess
import sys

import pytest

from qwen2_jax.cli import main

PLAN = ["plan", "--model", "qwen2-7b", "--topology", "v5p:2x2x1"]
TRAIN = [*PLAN, "--mesh", "fsdp=4", "--batch", "8"]


@pytest.fixture
def run(capsys):
    """Runs the command in this process: exit status, standard output, standard error."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("argv", [["--help"], TRAIN[1:], [*PLAN[1:], "--search"]], ids=["help", "plan", "search"])
def test_answers_without_jax(argv):
    script = "import sys; from qwen2_jax.cli import main\ntry: main(['plan', *sys.argv[1:]])\n"
    script += "finally: print([name for name in ('jax', 'flax', 'libtpu') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_plan_says_what_fits_and_what_limits(run):
    code, out, err = run(*TRAIN)
    assert (code, err) == (0, "")
    assert "qwen2-7b: train, 8 rows of 4,096 tokens on v5p:2x2x1 (4 devices), mesh fsdp=4" in out
    assert "Fits: " in out and "bound by compute" in out and "not a promise" in out


def test_json_has_everything_under_names_that_stay(run):
    code, out, _ = run(*TRAIN, "--json")
    report = json.loads(out)
    assert code == 0
    assert report.keys() == set(
        """
        model topology slices devices mesh task batch seq remat optimizer memory fits headroom flops memory_traffic
        host_traffic traffic seconds limit tokens_per_second mfu compiled
        """.split()
    )
    assert report["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert report["memory"]["parameters"] == pytest.approx(7_615_616_512, rel=1e-3)
    assert report["memory"]["total"] == report["memory"]["arguments"] + report["memory"]["temporaries"]
    assert report["seconds"]["bound"] < report["seconds"]["serial"]
    assert report["compiled"] is None


def test_what_does_not_fit_is_an_error_with_ways_out(run):
    argv = ["plan", "--model", "qwen2-7b", "--topology", "v5e:4x4", "--mesh", "fsdp=16", "--batch", "1024", "--seq"]
    code, out, err = run(*argv, "4096")
    assert code == 2 and "Does not fit: " in out
    assert "--batch " in err and "--topology v5e:" in err
    code, out, err = run(*argv, "4096", "--json")
    assert code == 2 and json.loads(out)["fits"] is False and json.loads(out)["headroom"] < 0


BAD = {
    "axes do not multiply": (["--mesh", "fsdp=3", "--batch", "6"], "fsdp=3 is 3 devices, but there are 4"),
    "unknown axis": (["--mesh", "pipe=4", "--batch", "4"], "unknown mesh axis 'pipe'"),
    "axis twice": (["--mesh", "fsdp=2,fsdp=2", "--batch", "4"], "stands twice"),
    "no size": (["--mesh", "fsdp", "--batch", "4"], "an example is data=2,fsdp=-1"),
    "experts of a dense model": (["--mesh", "expert=4", "--batch", "4"], "this model is dense; use fsdp=4"),
    "batch does not divide": (["--mesh", "fsdp=4", "--batch", "6"], "batch of 6 rows does not divide"),
    "empty batch": (["--mesh", "fsdp=4", "--batch", "0"], "batch must be positive"),
    "no mesh": (["--batch", "4"], "--mesh is missing"),
    "no batch": (["--mesh", "fsdp=4"], "--batch is missing"),
    "too long": (["--mesh", "fsdp=4", "--batch", "4", "--seq", "200000"], "131072"),
    "unknown policy": (["--mesh", "fsdp=4", "--batch", "4", "--remat", "some"], "some"),
    "candidates of no search": (
        ["--mesh", "fsdp=4", "--batch", "4", "--top", "3"],
        "--top is of a search; add --search",
    ),
    "unknown option": (["--mash", "fsdp=4", "--batch", "4"], "--mesh"),
}


SEARCHED = {
    "axes do not multiply": (["--mesh", "expert=16"], "mesh expert=16 is 16 devices, but there are 4"),
    "experts of a dense model": (["--mesh", "expert=4"], "this model is dense; use fsdp=4"),
    "empty batch": (["--batch", "0"], "batch must be positive, got 0"),
    "batch does not divide": (["--mesh", "fsdp=-1", "--batch", "3"], "batch of 3 rows does not divide"),
    "no mesh divides": (["--topology", "v5p:4x4x12", "--batch", "64"], "a batch of 64 rows does not divide over"),
    "too long": (["--seq", "200000"], "qwen2-7b has positions for 131072 tokens, got seq 200000"),
    "too large": (["--batch", "512", "--seq", "131072"], "the least, mesh fsdp=4 with 512 rows, remat full, takes"),
    "none to print": (["--top", "0"], "--top must be 1 or more, got 0"),
    "fewer than none": (["--top", "-2"], "--top must be 1 or more, got -2"),
}


@pytest.mark.parametrize(("argv", "complaint"), SEARCHED.values(), ids=SEARCHED)
def test_a_search_that_finds_nothing_says_why(run, argv, complaint):
    refused(run(*PLAN, "--search", *argv), complaint)


def test_a_search_prints_as_many_as_asked_for(run):
    for argv, count in (([], 10), (["--top", "3"], 3)):
        code, out, _ = run(*PLAN, "--search", "--mesh", "fsdp=-1", "--json", *argv)
        assert code == 0 and len(json.loads(out)["best"]) == count


@pytest.mark.parametrize("task", ["prefill", "decode"])
@pytest.mark.parametrize("flag", ["--remat full", "--optimizer adamw"])
def test_flags_of_training_are_refused_elsewhere(run, task, flag):
    argv = ["--mesh", "tensor=4", "--batch", "4", "--task", task, *flag.split()]
    refused(run(*PLAN, *argv), f"{flag.split()[0]} is of training, got --task {task}")


def test_a_prompt_divides_over_context_or_is_refused(run):
    argv = [*PLAN, "--task", "prefill", "--mesh", "context=4", "--batch", "1", "--seq"]
    refused(run(*argv, "4092"), "4092 tokens do not divide over context=4 in halves; use a multiple of 8")
    assert run(*argv, "4096")[0] == 0


@pytest.mark.parametrize(("argv", "complaint"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_in_one_line(run, argv, complaint):
    refused(run(*PLAN, *argv), complaint)


ELSEWHERE = {
    "v5p": "an example is v5p:4x4x4",
    "v5p:": "an example is v5p:4x4x4",
    "v5p:0x2x2": "an example is v5p:4x4x4",
    "v5p:4x4": "v5p is a 3D torus, got 2 dims",
    "v5p:3x3x3": "multiples of 4",
    "v5p:64x64x64": "use several slices",
    "v5e:16x32": "use several slices",
    "v5e:3x3": "2x2, 2x4, 4x4",
    "v7:4x4": "known are v4, v5e, v5p, v6e, H100, H200",
    "v5b:4x4x4": "did you mean v5p?",
    "H100:12": "nodes of 8",
    "H100:2x2": "nodes of 8",
}


@pytest.mark.parametrize(("topology", "complaint"), ELSEWHERE.items())
def test_unknown_topologies_are_refused_in_one_line(run, topology, complaint):
    refused(run("plan", "--model", "qwen2-7b", "--topology", topology, "--mesh", "fsdp=-1", "--batch", "64"), complaint)


INDIVISIBLE = {
    ("qwen2-57b-a14b", "v5p:4x4x12", "expert=3,fsdp=-1"): "num_experts 64 does not divide over expert=3",
    ("qwen2-57b-a14b", "v5p:4x4x12", "tensor=12,fsdp=-1"): "moe_intermediate_size 2560 does not divide over tensor=12",
    ("qwen2-7b", "v5p:4x4x12", "fsdp=-1"): "hidden_size 3584 does not divide over fsdp=192",
    ("qwen2-7b", "v5p:4x4x12", "tensor=3,fsdp=-1"): "intermediate_size 18944 does not divide over tensor=3",
    ("qwen2-0.5b", "v5e:16x16", "tensor=256"): "14 query heads over 2 key/value heads do not spread over 256 devices",
    ("qwen2-7b", "v5e:16x16", "fsdp=-1,context=16"): "4090 tokens do not divide over context=16",
}


@pytest.mark.parametrize(("what", "complaint"), INDIVISIBLE.items(), ids=map(" ".join, INDIVISIBLE))
def test_indivisible_shapes_are_refused_in_one_line(run, what, complaint):
    model, topology, mesh = what
    argv = ["plan", "--model", model, "--topology", topology, "--mesh", mesh, "--batch", "4096", "--seq", "4090"]
    refused(run(*argv), complaint)


def test_models_come_from_folders_too(run, tmp_path):
    config = {"model_type": "qwen2", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    config |= {"num_hidden_layers": 2, "intermediate_size": 1024, "vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--topology", "v5e:2x2", "--mesh", "fsdp=4", "--batch", "4", "--seq", "128", "--json"]
    code, out, _ = run("plan", "--model", str(tmp_path), *argv)
    assert code == 0 and json.loads(out)["fits"]
    refused(run("plan", "--model", str(tmp_path / "none"), *argv[:-1]), "no folder with a config.json", "qwen2-72b")
    refused(run("plan", "--model", "qwen3-7b", *argv[:-1]), "qwen3-7b is no folder with a config.json; published")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(run("plan", "--model", str(tmp_path), *argv[:-1]), "model_type must be one of")


def refused(result: tuple[int, str, str], *complaints: str) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("qwen2-jax: error: ") and err.count("\n") == 1, err
    for complaint in complaints:
        assert complaint in err
