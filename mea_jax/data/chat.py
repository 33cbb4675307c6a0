"""Render conversations with a published tokenizer's chat template, as transformers does.

A template is Jinja source, in tokenizer_config.json or chat_template.jinja. It runs in a sandbox:
it comes with a model, and may be anyone's.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from mea_jax.data.bad_input import first_line
from mea_jax.data.end_tokens import SPECIAL_TOKENS, TOKENIZER_CONFIG, read_object, text_of
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError

_FILE, _OLD_FILE = "chat_template.jinja", "chat_template.json"
Message = Mapping[str, str]  # {"role": "user", "content": ...}


def find_template(companions: Mapping[str, bytes]) -> str | None:
    """Return the chat template among a tokenizer's companion files, or None if there is none."""
    if _FILE in companions:
        return companions[_FILE].decode(errors="replace")
    for name in (_OLD_FILE, TOKENIZER_CONFIG):
        found = read_object(companions.get(name, b"")).get("chat_template")
        if isinstance(found, list):  # several named ones
            named = {entry.get("name"): entry.get("template") for entry in found}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], where: str) -> list[int]:
    """Return the token ids of a conversation, up to the beginning of the model's answer.

    Raise `UserError` as `render`.
    """
    return tokenizer.encode_marked(render(tokenizer, messages, where))


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], where: str, answer: bool = True
) -> str:
    """Return the text of a conversation, with special tokens written as text.

    Args:
      tokenizer: the tokenizer, whose companion files have the template.
      messages: the conversation.
      where: the beginning of an error message.
      answer: whether the text ends where the model's answer begins. Otherwise it ends after the
        content of the last message, which the model continues.

    Raises:
      UserError: there is no chat template, or it rejects the messages.
    """
    template = find_template(tokenizer.companions)
    if template is None:
        raise UserError(
            f"{where}: the tokenizer of this model has no chat template; leave out --chat, or use "
            "a model that was trained for chats"
        )
    try:
        text = _compiled(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=answer,
            tools=None,
            documents=None,
            **_special_tokens(tokenizer.companions),
        )
    except Exception as error:  # whatever the template does
        raise UserError(
            f"{where}: the model's chat template rejects it ({first_line(error)}); change the "
            "messages, or leave out --chat"
        ) from error
    if answer:
        return text
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _reject
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}, which marks answers in training and changes no text."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _reject(message: str) -> None:
    raise jinja2.TemplateError(message)


def _special_tokens(companions: Mapping[str, bytes]) -> dict[str, str]:
    """Return the texts of special tokens by their names in templates, such as "bos_token"."""
    found = {}
    for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG):
        for key, value in read_object(companions.get(name, b"")).items():
            if key.endswith("_token") and (text := text_of(value)):
                found[key] = text
    return found
