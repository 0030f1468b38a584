"""What a message says cannot look like the structure of the chat.

A template writes the tokens that begin and end turns as text, and a tokenizer makes tokens of such texts wherever they
stand. So in messages they are replaced before the template runs, and encoded as ordinary text afterwards: a web page
in a tool's result cannot open a turn of the system.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import RequestError
from service.chat_messages import Message
from service.parsers.markers import THINK, THINK_END

MAX_ESCAPES = 8192
# Characters that Unicode keeps out of texts: with a number between them they stand for a token's text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPE = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class MarkerEscapes:
    """Replaces the texts of a vocabulary's added tokens, and puts them back in a form that gives no such token."""

    def __init__(self, tokens: Collection[str]) -> None:
        """tokens: texts that the tokenizer finds before anything else."""
        # The longest first, as the tokenizer looks for them.
        self._texts = [*sorted((token for token in tokens if len(token) > 1), key=len, reverse=True), _OPEN]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._any = re.compile("|".join(map(re.escape, self._texts)))

    def message(self, message: Message) -> Message:
        """A copy without any of the texts. An assistant's content may hold the markers of its reasoning."""
        fields = self._value({name: value for name, value in message.items() if name not in ("role", "content")}, ())
        kept = (THINK, THINK_END) if message["role"] == "assistant" else ()
        return Message(
            message.index, {"role": message["role"], "content": self._value(message["content"], kept), **fields}
        )

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A copy without any of the texts."""
        copy: dict[str, Any] = self._value(tool, ())
        return copy

    def pieces(self, prompt: str) -> list[str]:
        """What to encode, each piece by itself: a text that was replaced comes in two, neither of them a token.

        RequestError when there are too many to encode one by one.
        """
        pieces: list[str] = []
        begin = 0
        for count, found in enumerate(_ESCAPE.finditer(prompt), start=1):
            if count > MAX_ESCAPES:
                raise RequestError(f"messages hold more than {MAX_ESCAPES} texts of special tokens", param="messages")
            number = int(found.group(1))
            if number < len(self._texts):
                text = self._texts[number]
                pieces += [prompt[begin : found.start()], text[:1], text[1:]]
                begin = found.end()
        pieces.append(prompt[begin:])
        return [piece for piece in pieces if piece]

    def _value(self, value: Any, kept: Collection[str]) -> Any:
        if isinstance(value, str):
            return self._any.sub(lambda found: self._replace(found.group(), kept), value)
        if isinstance(value, list):
            return [self._value(entry, kept) for entry in value]
        if isinstance(value, Mapping):
            return {self._value(name, kept): self._value(entry, kept) for name, entry in value.items()}
        return value

    def _replace(self, text: str, kept: Collection[str]) -> str:
        return text if text in kept else f"{_OPEN}{self._numbers[text]}{_CLOSE}"
