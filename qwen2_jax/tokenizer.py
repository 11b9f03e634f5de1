"""Text to token ids and back: the byte-level BPE that all Qwen2 models share."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen2_jax import chat_template
from qwen2_jax.json_object import read_json_object

# The pieces that BPE never crosses, in order of precedence; every digit is a piece of its own. Part of the format.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


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
        """
        self.backend = backend
        self.template = template
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._named_tokens = {name: _content(settings[name]) for name in names if settings.get(name)}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.json with merges.txt, and tokenizer_config.json if there is one.

        Raises:
          FileNotFoundError: if the folder holds no tokenizer.
          ValueError: if one of its files is damaged, or they contradict each other.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        settings = read_json_object(path) if path.exists() else {}
        return cls(_backend(folder, settings), settings, _template(folder, settings))

    @property
    def vocab_size(self) -> int:
        """Ids in use, control tokens included; a model's embedding may have more rows, as padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The id of the checkpoint's end-of-text token; empty if it names none."""
        eos = self.backend.token_to_id(self._named_tokens.get("eos_token", ""))
        return () if eos is None else (eos,)

    def encode(self, text: str, *, control_tokens: bool = True) -> list[int]:
        """The ids of `text`; `control_tokens=False` reads "<|im_end|>" and the like as ordinary text.

        Raises:
          ValueError: if the text is not Unicode (it holds half of a surrogate pair).
        """
        text.encode()
        self.backend.encode_special_tokens = not control_tokens
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, control_tokens: bool = True) -> str:
        """The text of `ids`; `control_tokens=False` leaves those out. Bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self, control_tokens=control_tokens)
        return decoder.add(ids) + decoder.finish()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a chat, ready for `encode`; `variables` are the template's own, for example `tools`.

        Raises:
          ValueError: if the template refuses the messages.
        """
        variables = {**self._named_tokens, "tools": None, "documents": None, **variables}
        return chat_template.render(self.template, messages, add_generation_prompt=add_generation_prompt, **variables)


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
        return self._utf8.decode(b"".join(map(self._bytes, ids)))

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id]
        return bytes(_BYTE_OF_CHARACTER[character] for character in self._token(id) or "")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet, of vocab.json: printable Latin-1 stands for itself, the rest follows from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _backend(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    source = whole if whole.exists() else vocab
    if not source.exists() or (source is vocab and not merges.exists()):
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json with merges.txt")
    try:
        if source is whole:
            backend = tokenizers.Tokenizer.from_file(str(whole))
        else:
            backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            backend.normalizer = normalizers.NFC()
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            backend.decoder = decoders.ByteLevel()
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{source} cannot be read as a tokenizer: {error}") from error

    listed = settings.get("added_tokens_decoder", {})
    if source is vocab and not listed:
        first = backend.get_vocab_size()
        listed = {first + i: {"content": token, "special": True} for i, token in enumerate(_CONTROL_TOKENS)}
    for id, token in sorted((int(id), token) for id, token in listed.items()):
        if backend.token_to_id(token["content"]) != id:
            backend.add_tokens([tokenizers.AddedToken(**{"normalized": False, **token})])
        if (actual := backend.token_to_id(token["content"])) != id:
            raise ValueError(
                f"tokenizer_config.json gives {token['content']!r} the id {id}, {source.name} gives it {actual}"
            )
    return backend


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    """The chat template, from where transformers looks for it: its own file, then tokenizer_config.json."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or chat_template.CHATML
    if isinstance(template, str):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise ValueError(f"tokenizer_config.json has chat templates named {', '.join(named)}, and no 'default'")
    return named["default"]


def _added_tokens(backend: tokenizers.Tokenizer) -> dict[int, tokenizers.AddedToken]:
    return backend.get_added_tokens_decoder()


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
