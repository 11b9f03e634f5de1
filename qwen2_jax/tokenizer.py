"""Text to token ids and back: the byte-level BPE that all Qwen2 models share."""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen2_jax import chat_template
from qwen2_jax.json_object import brief, read_json_object

# The pieces that BPE never crosses, in order of precedence; every digit is a piece of its own. Part of the format.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters, digits, white space, and characters of two, three and four bytes. Comes back from any byte-level tokenizer.
_PROBE = "Hi 12\r\n é 世 👍"
# At which other tokenizers' rules, GPT-2's say, put their cuts elsewhere, or normalize otherwise.
_SPLIT_PROBE = "It's IT'S 123 (a)b.c !?\r\n\n  e\u0301 x_y\t\tz 世界…  "
_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_START = "<|im_start|>"


class Tokenizer:
    """Encodes text without adding anything: no BOS, no prefix space.

    Source: Qwen2 technical report (arXiv 2407.10671), section 2.1.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        template: str = chat_template.CHATML,
    ):
        """
        Args:
          backend: the byte-level BPE.
          settings: what tokenizer_config.json says.
          template: of chats, in Jinja.

        Raises:
          ValueError: if the settings name a token by something that is no text.
        """
        self.backend = backend
        self.template = template
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._named_tokens = {name: _content(name, settings[name]) for name in names if settings.get(name)}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.json with merges.txt, and tokenizer_config.json if there is one.

        Raises:
          OSError: if the folder holds no tokenizer, or a file cannot be read.
          ValueError: if one of its files is damaged, they contradict each other, or the tokenizer is not byte-level.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        settings = read_json_object(path) if path.exists() else {}
        backend, source = _backend(folder)
        own_template = _template_file(folder)
        try:
            _add_control_tokens(backend, source, settings.get("added_tokens_decoder") or {})
            tokenizer = cls(backend, settings, _template(settings) if own_template is None else own_template)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tokenizer._check(source)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids in use, control tokens included; a model's embedding may have more rows, as padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The id of the checkpoint's end-of-text token; empty if it names none."""
        eos = self.backend.token_to_id(self._named_tokens.get("eos_token", ""))
        return () if eos is None else (eos,)

    @property
    def bos_id(self) -> int | None:
        """The id of the checkpoint's begin-of-text token; Qwen2's name none."""
        return self.backend.token_to_id(self._named_tokens.get("bos_token", ""))

    def control_id(self, text: str) -> int | None:
        """The id of a control token such as "<|im_end|>"; None for any other text."""
        added = _added_tokens(self.backend)
        return next((id for id, token in added.items() if token.special and token.content == text), None)

    def encode(self, text: str, *, control_tokens: bool = True) -> list[int]:
        """The ids of `text`; `control_tokens=False` reads "<|im_end|>" and the like as ordinary text.

        Raises:
          ValueError: if the text is not Unicode (it holds half of a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not Unicode, so it has no tokens: {error}") from error
        self.backend.encode_special_tokens = not control_tokens
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, control_tokens: bool = True) -> str:
        """The text of `ids`; `control_tokens=False` leaves those out. Bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self, control_tokens=control_tokens)
        return decoder.add(ids) + decoder.finish()

    def byte_counts(self, ids: Iterable[int]) -> list[int]:
        """How many bytes of text, in UTF-8, each id stands for."""
        decoder = StreamDecoder(self)
        return [len(decoder.bytes_of(id)) for id in ids]

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a chat, ready for `encode`; `variables` are the template's own, for example `tools`.

        Raises:
          ValueError: if the template refuses the messages, or marks them by a token that the tokenizer does not have.
        """
        if _START in self.template and self.control_id(_START) is None:
            raise ValueError(
                f"the tokenizer has no token {_START}, which chats begin their messages with: this is no chat model, "
                "so give it the text itself (generate without --chat)"
            )
        variables = {**self._named_tokens, "tools": None, "documents": None, **variables}
        return chat_template.render(self.template, messages, add_generation_prompt=add_generation_prompt, **variables)

    def _check(self, source: Path) -> None:
        """Raises ValueError unless text comes back from its tokens, as it does from every Qwen2 tokenizer."""
        problem = f"{source} is not a byte-level BPE tokenizer, which Qwen2 models need"
        try:
            again = self.decode(self.encode(_PROBE))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{problem}: {error}") from error
        if again != _PROBE:
            raise ValueError(f"{problem}: {_PROBE!r} comes back as {brief(again)}")


class StreamDecoder:
    """Decodes ids as they come, holding back a character until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, *, control_tokens: bool = True):
        self._token = tokenizer.backend.id_to_token
        self._added = {id: token.content.encode() for id, token in _added_tokens(tokenizer.backend).items()}
        if not control_tokens:
            self._added.update((id, b"") for id, token in _added_tokens(tokenizer.backend).items() if token.special)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete. Ids that are no token (rows of padding) are no text."""
        return self._utf8.decode(b"".join(map(self.bytes_of, ids)))

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        return self._utf8.decode(b"", final=True)

    def bytes_of(self, id: int) -> bytes:
        """What one id stands for, of which several may make up a character."""
        if id in self._added:
            return self._added[id]
        token = self._token(id) or ""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:
            raise ValueError(
                f"token {id}, {brief(token)}, is not spelled in bytes; is the tokenizer Qwen2's?"
            ) from None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet, of vocab.json: printable Latin-1 stands for itself, the rest follows from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def tokenizer_file(folder: Path) -> Path | None:
    """What `Tokenizer.from_folder` reads: tokenizer.json, or vocab.json with merges.txt; None if neither is there."""
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        return whole
    return vocab if vocab.exists() and merges.exists() else None


def splits_otherwise(folder: Path) -> bool:
    """Whether the tokenizer in a folder cuts text into other pieces than Qwen2's do, before BPE.

    transformers gives a model of this type Qwen2's pieces, whatever tokenizer.json says. False for a file that cannot
    be read: who needs the tokenizer says why.
    """
    if (source := tokenizer_file(folder)) is None or source.name != "tokenizer.json":
        return False
    try:
        # Without its vocabulary, which takes time and memory.
        rules = json.loads(source.read_bytes()) | {"model": {"type": "BPE", "vocab": {}, "merges": []}}
        backend = tokenizers.Tokenizer.from_str(json.dumps(rules | {"added_tokens": [], "post_processor": None}))
    except Exception:  # the library raises nothing narrower
        return False
    return _pieces(backend.normalizer, backend.pre_tokenizer) != _pieces(normalizers.NFC(), _pre_tokenizer())


def _pieces(normalizer: Any, pre_tokenizer: Any) -> list[str]:
    text = _SPLIT_PROBE if normalizer is None else normalizer.normalize_str(_SPLIT_PROBE)
    return [text] if pre_tokenizer is None else [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Qwen2's."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _backend(folder: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """The tokenizer of a folder, and the file that it comes from."""
    source = tokenizer_file(folder)
    if source is None:
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json with merges.txt")
    try:
        if source.name == "tokenizer.json":
            backend = tokenizers.Tokenizer.from_file(str(source))
        else:
            backend = tokenizers.Tokenizer(models.BPE.from_file(str(source), str(folder / "merges.txt")))
            backend.normalizer = normalizers.NFC()
            backend.pre_tokenizer = _pre_tokenizer()
            backend.decoder = decoders.ByteLevel()
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{source} cannot be read as a tokenizer: {error}") from error
    # What a training run left in the file is not the model's: it would cut prompts, or fill them up.
    backend.no_truncation()
    backend.no_padding()
    return backend, source


def _add_control_tokens(backend: tokenizers.Tokenizer, source: Path, listed: Any) -> None:
    """Adds the tokens of `added_tokens_decoder`, id to description; without any, vocab.json still has Qwen2's three."""
    if source.name == "vocab.json" and not listed:
        first = backend.get_vocab_size()
        listed = {first + i: {"content": token, "special": True} for i, token in enumerate(_CONTROL_TOKENS)}
    if not isinstance(listed, dict):
        raise ValueError(f"added_tokens_decoder must be an object, ids to tokens, got {brief(listed)}")
    tokens: dict[int, Any] = {}
    for key, token in listed.items():
        id = int(key) if len(str(key)) < 10 and str(key).isdecimal() else -1
        if id < 0 or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"added_tokens_decoder must give ids tokens with a content, got {brief({key: token})}")
        if id in tokens:
            raise ValueError(f"added_tokens_decoder gives the id {id} twice")
        tokens[id] = token
    for id, token in sorted(tokens.items()):
        content = token["content"]
        if backend.token_to_id(content) != id:
            try:
                backend.add_tokens([tokenizers.AddedToken(**{"normalized": False, **token})])
            except Exception as error:
                raise ValueError(f"added_tokens_decoder has a token that cannot be read, {brief(token)}") from error
        if (actual := backend.token_to_id(content)) != id:
            raise ValueError(f"it gives {brief(content)} the id {id}, {source.name} gives it {actual}")


def _template_file(folder: Path) -> str | None:
    """A chat template of its own file, which transformers prefers to the one of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8") if file.exists() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def _template(settings: Mapping[str, Any]) -> str:
    template = settings.get("chat_template") or chat_template.CHATML
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        named = {entry["name"]: entry.get("template") for entry in entries}
        if "default" not in named:
            raise ValueError(f"chat_template has no template named 'default', only {brief(list(named))}")
        template = named["default"]
    if not isinstance(template, str):
        raise ValueError(f"chat_template must be text, or a list of named texts, got {brief(template)}")
    return template


def _added_tokens(backend: tokenizers.Tokenizer) -> dict[int, tokenizers.AddedToken]:
    return backend.get_added_tokens_decoder()


def _content(name: str, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(f"{name} must be text, or an object with a content, got {brief(token)}")
    return content
