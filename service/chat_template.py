"""The checkpoint's chat template: messages to one prompt, in a Jinja sandbox with bounds on time and size.

The template comes with the weights; what it is given comes from outside. Variables and filters are those that
transformers gives to chat templates.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.config import read_json
from engine.errors import CheckpointError, RequestError
from service.chat_messages import Message
from service.request_body import quote

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
MAX_RENDER_S = 5.0
MAX_PROMPT_CHARS = 64 * 2**20
# Variables that a request does not set by chat_template_kwargs: they come from its other fields, or from the file.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token"})
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class _TooMuch(Exception):
    """A bound was reached."""


class _Rendering(threading.local):
    """What one thread is rendering. deadline_s: time.monotonic().  index: of the message that was looked at last."""

    deadline_s = 0.0
    index: int | None = None

    def look(self, target: Any) -> None:
        """The template reads something of `target`."""
        if isinstance(target, Message):
            self.index = target.index
        if time.monotonic() > self.deadline_s:
            raise _TooMuch(f"takes longer than {MAX_RENDER_S:g} s")


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant says for training: here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Every attribute, entry and call passes through here."""

    def __init__(self, rendering: _Rendering) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self._rendering = rendering
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = time.strftime

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._rendering.look(obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._rendering.look(obj)
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._rendering.look(obj)
        return super().call(context, obj, *args, **kwargs)


class ChatTemplate:
    """A compiled template. May be used by several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, name: str = TEMPLATE_FILE) -> None:
        """Raises CheckpointError for a template that Jinja cannot read. name: of the file, for that."""
        self._rendering = _Rendering()
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _Sandbox(self._rendering).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{name}: line {error.lineno}: {error.message}") from error

    @classmethod
    def from_dir(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a checkpoint, None when it has none: chat_template.jinja, or the entry of the tokenizer's."""
        directory = Path(path)
        settings_file, file = directory / SETTINGS_FILE, directory / TEMPLATE_FILE
        settings = read_json(settings_file) if settings_file.is_file() else {}
        tokens = {key: text for key in _SPECIAL_TOKENS if (text := _text_of_token(settings.get(key))) is not None}
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), tokens)
        source = settings.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{SETTINGS_FILE}: chat_template must be text, got {type(source).__name__}")
        return cls(source, tokens, name=SETTINGS_FILE)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]
    ) -> str:
        """The prompt up to where the answer begins. Raises RequestError, with the message that was being written."""
        rendering = self._rendering
        rendering.deadline_s = time.monotonic() + MAX_RENDER_S
        rendering.index = None
        given = {**self._special_tokens, **variables, "messages": list(messages), "add_generation_prompt": True}
        if tools:
            given["tools"] = list(tools)
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(given):
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS:
                    raise _TooMuch(f"gives more than {MAX_PROMPT_CHARS} characters")
                pieces.append(piece)
        except Exception as error:  # a template may raise anything over what a client sent
            where = "messages" if rendering.index is None else f"messages[{rendering.index}]"
            reason = str(error) if isinstance(error, _TooMuch | jinja2.TemplateError) else _shown(error)
            raise RequestError(f"{where}: the chat template {_verb(error)}{reason}", param="messages") from error
        return "".join(pieces)


def _verb(error: Exception) -> str:
    return "" if isinstance(error, _TooMuch) else "refuses it: "


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def check_variables(variables: Mapping[str, Any]) -> None:
    """RequestError when chat_template_kwargs has a name that is not its own."""
    for name in variables:
        if name in RESERVED or not name.isidentifier():
            raise RequestError(
                f"chat_template_kwargs cannot set {quote(name)}: it comes from other fields or is no name",
                param="chat_template_kwargs",
            )


def _text_of_token(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _raise(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
