"""The harness's own Hugging Face model is the oracle: the same answers, metrics and, to 1e-3, log-likelihoods."""

import json

import pytest
import torch
import transformers
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from sqlitedict import SqliteDict

from qwen2_jax import generation
from qwen2_jax.command import parse
from qwen2_jax.commands import evaluate_lm_eval
from qwen2_jax.commands.harness import evaluate_tasks
from qwen2_jax.evaluation import scoring
from qwen2_jax.plugins.lm_eval import Qwen2JaxLM
from tests.oracles.harness import named
from tests.oracles.huggingface import build
from tests.oracles.tokenizers import write_byte_tokenizer
from tests.processes import run_processes

pytestmark = pytest.mark.torch

TASKS = ("choices", "letters", "cloze", "rolling", "stops", "arithmetic", "code")
CHATS = ("chat", "letters")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VARIANTS = {"dense": "tied", "moe": "moe"}


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    fields = {"vocab_size": 272, "max_position_embeddings": 256, "num_hidden_layers": 2}
    build(VARIANTS[request.param], folder, fields=fields)
    write_byte_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    settings = {"eos_token": "<|endoftext|>", "chat_template": CHAT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Otherwise transformers goes on after the end, as long as other rows of the batch do.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if request.param == "moe":
        model.set_experts_implementation("eager")
    oracle = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=256)
    return folder, oracle


def run(model, tasks, names, **options):
    return evaluate_tasks(model, named(tasks, *names).split(","), **options)


def assert_same(ours, theirs):
    assert_same_samples(ours["samples"], theirs["samples"])
    for task in theirs["samples"]:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)


def assert_same_samples(ours, theirs):
    """As the harness has them, or as it has written them, where every tuple is a list and every number text."""
    assert ours.keys() == theirs.keys()
    for task, samples in theirs.items():
        for mine, reference in zip(ours[task], samples, strict=True):
            assert mine["doc"] == reference["doc"]
            if isinstance(mine["arguments"], list):
                assert mine["arguments"] == reference["arguments"]
            for one, other in zip(mine["resps"], reference["resps"], strict=True):
                for answer, expected in zip(one, other, strict=True):
                    if isinstance(expected, str):
                        assert answer == expected, (task, mine["arguments"])
                    elif isinstance(expected, tuple | list):
                        assert float(answer[0]) == pytest.approx(expected[0], abs=1e-3)
                        assert str(answer[1]) == str(expected[1])
                    else:
                        assert float(answer) == pytest.approx(expected, abs=1e-3)


def compiled() -> int:
    """Programs of the model that this process has compiled."""
    programs = scoring._log_probabilities, generation._prefill, generation._decode
    return sum(program._cache_size() for program in programs)


def test_every_kind_of_request_equals_the_hugging_face_model(reference, tasks):
    folder, oracle = reference
    theirs = run(oracle, tasks, TASKS)
    model = Qwen2JaxLM(str(folder), dtype="float32", batch_size=8)
    before = compiled()
    ours = run(model, tasks, TASKS)
    assert_same(ours, theirs)
    assert compiled() - before == model.programs <= 12
    usage = ours["config"]["qwen2_jax"]
    assert usage["attention"] and {part for path in usage["attention"].values() for part in path.split(", then ")} == {
        "dense"
    }
    assert usage["skipped"] == 0 and ours["skipped"] == []
    assert usage["programs"] == model.programs and usage["scored_tokens"] > usage["scored_tokens_computed"] > 0
    assert 0 < usage["scoring_padding"] < 0.6
    assert usage["requests"].keys() == {"loglikelihood", "loglikelihood_rolling", "generate_until"}


@pytest.mark.parametrize("reference", ["dense", pytest.param("moe", marks=pytest.mark.slow)], indirect=True)
def test_chats_equal_the_hugging_face_model(reference, tasks):
    folder, oracle = reference
    how = dict(chat=True, system_prompt="Be brief.")
    model = Qwen2JaxLM(str(folder), dtype="float32")
    for multiturn in (True, False):
        theirs = run(oracle, tasks, CHATS, multiturn=multiturn, **how)
        assert_same(run(model, tasks, CHATS, multiturn=multiturn, **how), theirs)
        prompt = theirs["samples"]["qwen2_jax_test_chat"][0]["arguments"][0][0]
        assert prompt.count("<|im_start|>user") == (3 if multiturn else 1)


def mesh_for(oracle):
    moe = any("experts" in name for name in oracle.model.state_dict())
    return "data=2,expert=2,tensor=2" if moe else "data=2,tensor=2,context=2"


def row_by_row(oracle):
    """In batches of rows, the harness's model goes on behind an end that is a control token until all have ended."""
    return HFLM(pretrained=oracle.model, tokenizer=oracle.tokenizer, batch_size=1, device="cpu", max_length=256)


@pytest.mark.slow
def test_every_kind_of_request_on_a_mesh(reference, tasks):
    folder, oracle = reference
    model = Qwen2JaxLM(str(folder), dtype="float32", mesh=mesh_for(oracle).replace(",", ";"))
    assert model.session.mesh.size == 8
    assert_same(run(model, tasks, TASKS), run(oracle, tasks, TASKS))
    assert_same(run(model, tasks, CHATS, chat=True), run(row_by_row(oracle), tasks, CHATS, chat=True))


def written_samples(folder, tasks):
    samples = {}
    for task in tasks:
        (file,) = folder.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return samples


@pytest.mark.slow
def test_two_processes_equal_the_hugging_face_model(reference, tasks, tmp_path):
    """Every sample, from what the harness writes. The processes were killed before, at different requests: what one
    wrote down that the first did not (here it is wrong) is computed again."""
    folder, oracle = reference
    theirs = run(oracle, tasks, TASKS)
    common = ["--model", folder, "--dtype", "float32", "--mesh", mesh_for(oracle), "--json"]
    arguments = [*common, "--out", tmp_path / "out", "--tasks", named(tasks, *TASKS)]
    options = parse(evaluate_lm_eval.Options, [str(word) for word in arguments], prog="")
    answers = evaluate_lm_eval._answers(options.out, options, folder)
    letters = [
        (tuple(request), tuple(answer[0]))
        for sample in theirs["samples"]["qwen2_jax_test_letters"]
        for request, answer in zip(sample["arguments"], sample["resps"], strict=True)
    ]
    first, second = (
        {request: answer for request, answer in letters[:4]},
        {request: (7.0, True) for request, _ in letters},
    )
    for process, known in enumerate((first, second)):
        with SqliteDict(str(answers / f"requests_rank{process}.db"), autocommit=True) as written:
            for request, answer in known.items():
                written[hash_args("loglikelihood", request)] = answer
    outs = run_processes(["evaluate", "lm-eval", *arguments], 2, 4, tmp_path)
    assert not outs[1]
    usage = json.loads(outs[0])["usage"]
    scored = sum(
        len(sample["resps"]) for name in ("choices", "cloze") for sample in theirs["samples"][f"qwen2_jax_test_{name}"]
    )
    assert usage["requests"]["loglikelihood"] == scored + len(letters) - 4
    assert_same_samples(written_samples(tmp_path / "out", theirs["samples"]), theirs["samples"])

    theirs = run(row_by_row(oracle), tasks, CHATS, chat=True)
    how = ["--apply-chat-template", "--out", tmp_path / "chats", "--tasks", named(tasks, *CHATS)]
    run_processes(["evaluate", "lm-eval", *common, *how], 2, 4, tmp_path)
    assert_same_samples(written_samples(tmp_path / "chats", theirs["samples"]), theirs["samples"])


@pytest.mark.parametrize("reference", ["dense"], indirect=True)
def test_long_inputs_lose_what_they_lose_in_the_harness(reference, tasks):
    folder, oracle = reference
    shorter = HFLM(pretrained=oracle.model, tokenizer=oracle.tokenizer, batch_size=4, device="cpu", max_length=48)
    names = ("choices", "rolling")
    model = Qwen2JaxLM(str(folder), dtype="float32", max_length=48)
    ours = run(model, tasks, names)
    assert_same(ours, run(shorter, tasks, names))
    assert ours["config"]["qwen2_jax"]["truncated"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["dense"], indirect=True)
def test_the_model_sees_more_where_its_mode_reaches_so_far(reference, tasks):
    """Prompts are cut as by a model that was opened to see so much, and no longer once it goes back."""
    folder, _ = reference
    how = dict(dtype="float32", mode="dca", chunk_size=64, local_size=8, max_gen_toks=32)
    model, names = Qwen2JaxLM(str(folder), **how), ["rolling", "stops"]
    short = run(model, tasks, names)
    model.see(prompts_of=400)
    assert model.max_length == 432
    assert_same(run(model, tasks, names), run(Qwen2JaxLM(str(folder), max_length=432, **how), tasks, names))
    model.see()
    assert model.max_length == 256
    assert_same(run(model, tasks, names), short)

    plain = Qwen2JaxLM(str(folder), dtype="float32")
    plain.see(prompts_of=200)
    assert plain.max_length == 256  # room for an answer as far as there is any
    with pytest.raises(ValueError, match="the model sees 256 tokens at once, its prompts have 300; mode=yarn"):
        plain.see(prompts_of=300)
    with pytest.raises(ValueError, match="the model sees 40 tokens at once, its prompts have 64; raise max_length"):
        Qwen2JaxLM(str(folder), max_length=40, **how).see(prompts_of=64)


@pytest.mark.parametrize("reference", ["dense"], indirect=True)
def test_the_harness_finds_its_answers_again(reference, tasks, tmp_path):
    folder, _ = reference
    names, cache = ("letters", "stops"), str(tmp_path / "answers")
    first = run(Qwen2JaxLM(str(folder), dtype="float32"), tasks, names, use_cache=cache)
    model = Qwen2JaxLM(str(folder), dtype="float32")
    again = run(model, tasks, names, use_cache=cache)
    assert_same(again, first)
    assert model.usage()["requests"] == {}


@pytest.mark.parametrize("reference", ["dense"], indirect=True)
def test_bad_arguments_are_named(reference):
    folder, _ = reference
    for arguments, message in [
        (dict(), "model_args must name one checkpoint"),
        (dict(path=folder, pretrained=folder), "model_args must name one checkpoint"),
        (dict(path=folder, dtpye="float32"), "there is no 'dtpye'; did you mean 'dtype'?"),
        (dict(path=folder, dtype="float8"), "dtype must be float32, bfloat16 or auto, got 'float8'"),
        (dict(path=folder, batch_size="many"), "batch_size must be a whole number from 1 on, got 'many'"),
        (dict(path=folder, max_length=257), "max_length is 257, the model has 256 positions"),
        (dict(path=folder, device="cuda"), "device is 'cuda', but JAX runs on cpu"),
        (dict(path=folder, mesh="data=3"), "data"),
    ]:
        with pytest.raises(ValueError, match=message):
            Qwen2JaxLM(**arguments)
    assert Qwen2JaxLM(pretrained=folder, trust_remote_code=False, device="cpu").batch_size == "auto"
