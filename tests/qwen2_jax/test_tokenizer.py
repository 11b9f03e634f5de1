"""The tokenizer against known ids of the real vocabulary, and against transformers on everything else."""

import json
import shutil
import unicodedata

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from qwen2_jax.tokenizer import StreamDecoder, Tokenizer, splits_otherwise

VECTORS = {
    "What is the capital of France?": [3838, 374, 279, 6722, 315, 9625, 30],
    "Hello world 2024! it's": [9707, 1879, 220, 17, 15, 17, 19, 0, 432, 594],
    "你好，世界": [108386, 3837, 99489],
    "안녕하세요": [126246, 144370, 91145],
    "def add(a, b):\n    return a + b\n": [750, 912, 2877, 11, 293, 982, 262, 470, 264, 488, 293, 198],
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n": [
        *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198)
    ],
    "user\n": [872, 198],
    "assistant\n": [77091, 198],
    "": [],
}
QWEN2_TEMPLATE = (  # as in the tokenizer_config.json of the published Qwen2 models
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": " hi \n"}]
CHATS = [
    QUESTION,
    [{"role": "system", "content": "Be brief."}, *QUESTION],
    [*QUESTION, {"role": "assistant", "content": "你好!"}, {"role": "user", "content": "<b>&amp;"}],
]

# Pieces at which the pre-tokenizer, Unicode normalisation or the control tokens could go wrong.
NASTY = st.lists(
    st.text(max_size=8)
    | st.sampled_from(
        [
            "<|im_end|>",
            "<|im_start|>",
            "<|im_",
            "|>",
            "<|endoftext|>",
            "e\u0301",
            "\u1100\u1161",
            "\ufb01",
            "\u2167",
            "½",
        ]
        + [
            "\r\n",
            "\n\n",
            " \n ",
            "\t",
            "\u00a0",
            "\u3000",
            "   ",
            "'S",
            "'ll",
            "\u017f",
            "123",
            "٣",
            "\u200d",
            "👩‍👩‍👧",
            "\0",
            "\ufffd",
        ]
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def folders(qwen_files, tmp_path_factory):
    """The same vocabulary in both spellings, with the tokenizer_config.json of Qwen2."""
    settings = json.loads((qwen_files / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(id): settings["added_tokens_decoder"][str(id)] for id in range(151643, 151646)
    }
    settings["chat_template"] = QWEN2_TEMPLATE
    result = {}
    for name, files in {"tokenizer.json": ["tokenizer.json"], "merges.txt": ["vocab.json", "merges.txt"]}.items():
        result[name] = tmp_path_factory.mktemp("tokenizer")
        for file in files:
            shutil.copy(qwen_files / file, result[name])
        (result[name] / "tokenizer_config.json").write_text(json.dumps(settings))
    return result


@pytest.fixture(scope="module", params=["tokenizer.json", "merges.txt"])
def tokenizer(folders, request):
    return Tokenizer.from_folder(folders[request.param])


@pytest.fixture(scope="module")
def merges_only(folders):
    return Tokenizer.from_folder(folders["merges.txt"])


@pytest.fixture(scope="module")
def oracle(folders):
    return transformers.AutoTokenizer.from_pretrained(folders["merges.txt"])


@pytest.mark.parametrize("text", VECTORS)
def test_known_ids(tokenizer, text):
    assert tokenizer.encode(text) == VECTORS[text]
    assert tokenizer.decode(VECTORS[text]) == text


@given(text=NASTY)
def test_encodes_like_transformers(tokenizer, oracle, text):
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.encode(text, control_tokens=False) == oracle.encode(text, split_special_tokens=True)


@given(text=NASTY)
def test_round_trip_normalises_and_nothing_else(merges_only, text):
    assert merges_only.decode(merges_only.encode(text)) == unicodedata.normalize("NFC", text)


@given(ids=st.lists(st.integers(0, 151935) | st.sampled_from([151643, 151645, 220, 94, 161]), max_size=12))
def test_decodes_like_transformers(merges_only, oracle, ids):
    assert merges_only.decode(ids) == oracle.decode(ids)
    assert merges_only.decode(ids, control_tokens=False) == oracle.decode(ids, skip_special_tokens=True)


@given(text=NASTY)
def test_streaming_never_shows_half_a_character(merges_only, text):
    decoder = StreamDecoder(merges_only)
    text = unicodedata.normalize("NFC", text.replace("\ufffd", ""))
    pieces = [decoder.add([id]) for id in merges_only.encode(text)]
    assert "".join(pieces) == text
    assert decoder.finish() == ""


def test_streaming_ends_with_what_was_left(merges_only):
    decoder = StreamDecoder(merges_only)
    assert [decoder.add([id]) for id in merges_only.encode("\U00013000")[:-1]][-1] == ""
    assert decoder.finish() == "\ufffd"


def test_sizes_and_ends(tokenizer, folders, tmp_path):
    assert tokenizer.eos_ids == (151645,)
    assert Tokenizer.from_folder(folders["merges.txt"]).vocab_size == 151646
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folders["merges.txt"] / name, tmp_path)
    bare = Tokenizer.from_folder(tmp_path)
    assert bare.vocab_size == 151646
    assert bare.encode("<|endoftext|><|im_start|><|im_end|>") == [151643, 151644, 151645]
    assert bare.eos_ids == ()


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", ["qwen2", "qwen3", "chatml"])
def test_chats_like_transformers(tokenizer, oracle, qwen_files, chat, add_generation_prompt, template):
    theirs = QWEN2_TEMPLATE
    ours = Tokenizer(tokenizer.backend, {}, tokenizer.template)
    if template == "qwen3":
        theirs = ours.template = json.loads((qwen_files / "tokenizer_config.json").read_text())["chat_template"]
    elif template == "chatml":
        ours = Tokenizer(tokenizer.backend, {})
    expected = oracle.apply_chat_template(
        chat, chat_template=theirs, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours.apply_chat_template(chat, add_generation_prompt=add_generation_prompt) == expected


def test_template_tools_like_transformers(merges_only, oracle, qwen_files):
    template = json.loads((qwen_files / "tokenizer_config.json").read_text())["chat_template"]
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b & 'c' für"}}]
    expected = oracle.apply_chat_template(QUESTION, chat_template=template, tools=tools, tokenize=False)
    ours = Tokenizer(merges_only.backend, {}, template)
    assert ours.apply_chat_template(QUESTION, tools=tools, add_generation_prompt=False) == expected


def test_template_is_found_where_transformers_looks(folders, tmp_path):
    folder = shutil.copytree(folders["merges.txt"], tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(folder).apply_chat_template(QUESTION) == "named"
    (folder / "chat_template.jinja").write_text("{{ eos_token }} of its own file")
    assert Tokenizer.from_folder(folder).apply_chat_template(QUESTION) == "<|im_end|> of its own file"
    (folder / "chat_template.jinja").unlink()
    settings["chat_template"].pop()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="tool_use"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages[0].content.no.such }}", "no attribute"),
        ("{{ 1 + messages }}", "unsupported operand"),
    ],
)
def test_templates_that_fail(merges_only, template, complaint):
    with pytest.raises(ValueError, match=complaint):
        Tokenizer(merges_only.backend, {}, template).apply_chat_template(QUESTION)


def test_chat_without_messages(merges_only):
    with pytest.raises(ValueError, match="at least one message"):
        merges_only.apply_chat_template([])


def test_half_a_surrogate_pair_is_not_text(merges_only):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        merges_only.encode("\ud83d")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_damaged_files(folders, tmp_path, name):
    source = "tokenizer.json" if name == "tokenizer.json" else "merges.txt"
    folder = shutil.copytree(folders[source], tmp_path / "copy")
    content = (folder / name).read_bytes()
    # A lone token on a line of merges.txt is damage; a shorter file would still be a valid one.
    (folder / name).write_bytes(b"#version: 0.2\nlonely\n" if name == "merges.txt" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{'vocab.json' if name == 'merges.txt' else name}|is not JSON"):
        Tokenizer.from_folder(folder)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"vocab.json with merges.txt"):
        Tokenizer.from_folder(tmp_path)


def test_contradicting_ids(folders, tmp_path):
    folder = shutil.copytree(folders["tokenizer.json"], tmp_path / "copy")
    settings = {"added_tokens_decoder": {"151644": {"content": "<|im_end|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' the id 151644, tokenizer\.json gives it 151645"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"chat_template": 5}, "chat_template must be text"),
        ({"chat_template": ["a"]}, "chat_template has no template named 'default'"),
        ({"chat_template": [{"x": 1}]}, "chat_template has no template named 'default'"),
        ({"chat_template": [{"name": ["x"], "template": "a"}]}, "chat_template has no template named 'default'"),
        ({"chat_template": [{"name": "default", "template": 5}]}, "chat_template must be text"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object"),
        ({"added_tokens_decoder": {"5": "a"}}, "added_tokens_decoder must give ids tokens"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder must give ids tokens"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "added_tokens_decoder must give ids tokens"),
        ({"added_tokens_decoder": {"257": {"content": 3}}}, "added_tokens_decoder must give ids tokens"),
        ({"added_tokens_decoder": {"257": {"content": "a", "lstrip": []}}}, "a token that cannot be read"),
        ({"added_tokens_decoder": {"1": {"content": "a"}, "01": {"content": "b"}}}, "the id 1 twice"),
        ({"eos_token": 5}, "eos_token must be text"),
        ({"eos_token": {"x": 1}}, "eos_token must be text"),
        ({"bos_token": ["a"]}, "bos_token must be text"),
    ],
)
def test_settings_of_the_wrong_kind(tiny, settings, complaint):
    (tiny / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: .*{complaint}"):
        Tokenizer.from_folder(tiny)


@pytest.fixture
def tiny(tmp_path):
    """A folder with a tokenizer whose tokens are single bytes."""
    change_tokenizer(tmp_path)
    return tmp_path


def change_tokenizer(folder, **changes):
    """Writes the smallest byte-level tokenizer.json, with changes."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet()))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(backend.to_str()) | changes))


def alphabet():
    return pre_tokenizers.ByteLevel.alphabet()


def test_prompts_are_neither_cut_nor_filled_up(tiny):
    expected = Tokenizer.from_folder(tiny).encode("hello")
    assert len(expected) == 5
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
    padding = {"strategy": {"Fixed": 10}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    change_tokenizer(tiny, truncation=truncation, padding=padding | {"pad_type_id": 0, "pad_token": "!"})
    assert Tokenizer.from_folder(tiny).encode("hello") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "[UNK]"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"\u2581a": 0, "H": 1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": dict.fromkeys(alphabet(), 0), "merges": []}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ".*"}, "content": ""}},
    ],
)
def test_only_byte_level_tokenizers(tiny, changes):
    change_tokenizer(tiny, **changes)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a byte-level BPE tokenizer"):
        Tokenizer.from_folder(tiny)


@pytest.mark.parametrize(
    ("changes", "otherwise"),
    [
        ({}, False),
        ({"normalizer": None}, True),
        ({"pre_tokenizer": None}, True),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}, True),  # GPT-2's
        ({"pre_tokenizer": {"type": "NoSuchThing"}}, False),  # what cannot be read is told of elsewhere
    ],
)
def test_tokenizers_that_transformers_would_change(tiny, changes, otherwise, qwen_files):
    rules = json.loads((qwen_files / "tokenizer.json").read_text())
    change_tokenizer(tiny, **{name: rules[name] for name in ("normalizer", "pre_tokenizer")} | changes)
    assert splits_otherwise(tiny) == otherwise
    assert not splits_otherwise(qwen_files)


def test_chats_need_their_tokens(tiny):
    with pytest.raises(ValueError, match=r"no token <\|im_start\|>, .* \(generate without --chat\)"):
        Tokenizer.from_folder(tiny).apply_chat_template(QUESTION)
    (tiny / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer.from_folder(tiny).apply_chat_template(QUESTION) == " hi \n"


@pytest.mark.parametrize("id", ["1e999", "-1", "NaN", str(2**40), '"x"'])
def test_ids_that_are_none(tiny, id):
    (tiny / "tokenizer.json").write_text((tiny / "tokenizer.json").read_text().replace('": 7,', f'": {id},'))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.from_folder(tiny)


def test_tokens_that_are_not_bytes(tiny):
    vocab = {**json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"], "\u2581a": 256}
    change_tokenizer(tiny, model={"type": "BPE", "vocab": vocab, "merges": []})
    with pytest.raises(ValueError, match="token 256, .* is not spelled in bytes"):
        Tokenizer.from_folder(tiny).decode([256])


def test_template_files_are_utf8(tiny):
    (tiny / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.from_folder(tiny)
