"""Messages to the text a chat model was trained on, by the template that came with the checkpoint."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2's format, for checkpoints without a template. Content is not trimmed."""


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text of `messages` ({"role": ..., "content": ...} each), by a Jinja template as transformers writes them.

    Raises:
      ValueError: if the template is not valid, or refuses these messages.
    """
    if not messages:
        raise ValueError("a chat needs at least one message, got none")
    try:
        # Plain data only: a template comes from the network, and an object's methods would be its way out.
        plain = json.loads(json.dumps({"messages": messages, **variables}))
        return _compiled(template).render(**plain)
    except Exception as error:  # a template is a program of somebody else's: whatever it raises is about the input
        raise ValueError(f"the chat template failed: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    # What templates on the Hub count on: transformers' _compile_jinja_template, less its tracking of assistant tokens.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter of this name escapes HTML, which no chat wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
