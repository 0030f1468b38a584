"""An assistant's message from generated text: reasoning, content and tool calls, as the text arrives.

Reasoning stands between `<mm:think>` and `</mm:think>`. The prompt may have opened it already, or closed it; a model
that may choose opens it itself. Markers never get into reasoning or content, wherever they stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.parsers.arguments import Schema
from service.parsers.markers import NAMESPACE, THINK, THINK_END, Lexer, MarkerFree
from service.parsers.tools import BLOCK, INVOKE, ToolBlock, ToolCall

# Behind a namespace marker: a block begins, or a call whose block was not opened.
_BLOCK = f"<{BLOCK}>"
_CALL = re.compile(rf"<{INVOKE}\s")
_CALL_START = f"<{INVOKE}"
_MAX_SPACES = 64


@dataclass(slots=True)
class News:
    """What became certain: pieces of the message's two texts, and complete calls."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


def starts_in_reasoning(prompt: str) -> bool:
    """Whether what follows this prompt is reasoning: its last tag, if it ends with one, says so."""
    return prompt.rstrip().endswith(THINK)


class MessageParser:
    """Reads one message. Any way to cut the text into pieces gives the same message in the end.

    in_reasoning: how the text begins.  tools: the schemas of the tools that may be called, by name; None: calls are
    not read, and only their markers are taken out.  max_calls: later calls are left out.
    """

    def __init__(
        self, *, in_reasoning: bool, tools: Mapping[str, Schema] | None = None, max_calls: int | None = None
    ) -> None:
        self._lexer = Lexer()
        self._in_reasoning = in_reasoning
        self._tools = tools
        self._calls_left = max_calls
        self._reasoning, self._content = MarkerFree(), MarkerFree()
        self._ahead: str | None = None  # text behind a namespace marker that is not told apart yet
        self._block: ToolBlock | None = None
        self._news = News()

    def push(self, text: str) -> None:
        """Take the next text."""
        for piece in self._lexer.push(text):
            self._take(piece)

    def finish(self) -> None:
        """The text is complete. What was held back is text, but for the start of a tag that never came."""
        if held := self._lexer.finish():
            self._take(held)
        self._ahead = None

    def news(self) -> News:
        """What came since the last call."""
        news, self._news = self._news, News()
        return news

    def _take(self, piece: str) -> None:
        if self._block is not None:
            self._read_block(self._block, piece)
        elif piece == NAMESPACE:
            self._flush()
            self._ahead = None if self._tools is None else ""
        elif piece in (THINK, THINK_END):
            self._flush()
            self._in_reasoning = piece == THINK
        elif self._ahead is not None:
            self._look(self._ahead + piece)
        else:
            self._write(piece)

    def _look(self, text: str) -> None:
        """Tell what stands behind a namespace marker."""
        start = text.lstrip()
        if len(text) - len(start) > _MAX_SPACES:
            start = text
        if start.startswith(_BLOCK):
            self._open_block(start[len(_BLOCK) :])
        elif _CALL.match(start):
            self._open_block(NAMESPACE, start)
        elif _BLOCK.startswith(start) or _CALL_START.startswith(start):
            self._ahead = text
        else:
            self._ahead = None
            self._write(text)

    def _flush(self) -> None:
        """Text behind a namespace marker was no tag: it is text."""
        text, self._ahead = self._ahead, None
        if text:
            self._write(text)

    def _write(self, text: str) -> None:
        if self._in_reasoning:
            self._news.reasoning += self._reasoning.add(text)
        else:
            self._news.content += self._content.add(text)

    def _open_block(self, *pieces: str) -> None:
        self._ahead = None
        self._block = ToolBlock(self._tools or {})
        for piece in pieces:
            self._read_block(self._block, piece)

    def _read_block(self, block: ToolBlock, piece: str) -> None:
        """Here the markers of reasoning are text: a tool may well write a file that has them."""
        call = block.push(piece) if piece else None
        if call is None or self._calls_left == 0:
            return
        if self._calls_left is not None:
            self._calls_left -= 1
        self._news.calls.append(call)
