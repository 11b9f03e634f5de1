"""The harness's own Hugging Face model is the oracle: the same answers, metrics and, to 1e-3, log-likelihoods."""

import json

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from qwen2_jax import generation
from qwen2_jax.commands.harness import evaluate_tasks
from qwen2_jax.evaluation import scoring
from qwen2_jax.plugins.lm_eval import Qwen2JaxLM
from tests.oracles.harness import write_tasks
from tests.oracles.huggingface import build
from tests.oracles.tokenizers import write_byte_tokenizer

pytestmark = pytest.mark.torch

TASKS = ("choices", "letters", "cloze", "rolling", "stops", "arithmetic", "code")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VARIANTS = {"dense": "tied", "moe": "moe"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", autouse=True)
def data_sets_stay_here(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


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
    files = [str(tasks / f"{name}.yaml") for name in names]
    return evaluate_tasks(model, files, **options)


def assert_same(ours, theirs):
    assert ours["samples"].keys() == theirs["samples"].keys()
    for task, samples in theirs["samples"].items():
        for mine, reference in zip(ours["samples"][task], samples, strict=True):
            assert mine["arguments"] == reference["arguments"]
            for one, other in zip(mine["resps"], reference["resps"], strict=True):
                for answer, expected in zip(one, other, strict=True):
                    if isinstance(expected, str):
                        assert answer == expected, (task, mine["arguments"])
                    elif isinstance(expected, tuple | list):
                        assert answer[0] == pytest.approx(expected[0], abs=1e-3)
                        assert answer[1] == expected[1]
                    else:
                        assert answer == pytest.approx(expected, abs=1e-3)
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)


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
    assert usage["programs"] == model.programs and usage["scored_tokens"] > usage["scored_tokens_computed"] > 0
    assert 0 < usage["scoring_padding"] < 0.6
    assert usage["requests"].keys() == {"loglikelihood", "loglikelihood_rolling", "generate_until"}


def test_chats_equal_the_hugging_face_model(reference, tasks):
    folder, oracle = reference
    how = dict(chat=True, system_prompt="Be brief.")
    model = Qwen2JaxLM(str(folder), dtype="float32")
    for multiturn in (True, False):
        theirs = run(oracle, tasks, ["chat", "letters"], multiturn=multiturn, **how)
        assert_same(run(model, tasks, ["chat", "letters"], multiturn=multiturn, **how), theirs)
        prompt = theirs["samples"]["qwen2_jax_test_chat"][0]["arguments"][0][0]
        assert prompt.count("<|im_start|>user") == (3 if multiturn else 1)


@pytest.mark.parametrize("reference", ["moe"], indirect=True)
def test_on_a_mesh(reference, tasks):
    folder, oracle = reference
    names = ("letters", "stops")
    model = Qwen2JaxLM(str(folder), dtype="float32", mesh="data=2;expert=2;tensor=2")
    assert model.session.mesh.size == 8
    assert_same(run(model, tasks, names), run(oracle, tasks, names))


@pytest.mark.parametrize("reference", ["dense"], indirect=True)
def test_long_inputs_lose_what_they_lose_in_the_harness(reference, tasks):
    folder, oracle = reference
    shorter = HFLM(pretrained=oracle.model, tokenizer=oracle.tokenizer, batch_size=4, device="cpu", max_length=48)
    names = ("choices", "rolling")
    model = Qwen2JaxLM(str(folder), dtype="float32", max_length=48)
    ours = run(model, tasks, names)
    assert_same(ours, run(shorter, tasks, names))
    assert ours["config"]["qwen2_jax"]["truncated"] > 0


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
