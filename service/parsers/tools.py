"""MiniMax-M3's tool calls: what stands between the tags `<tool_call>` and `</tool_call>` of its namespace.

One line of it, with NS for the namespace marker:

    NS<tool_call>NS<invoke name="f">NS<city>ParisNS</city>NS<days>NS<item>1NS</item>NS</days>NS</invoke>NS</tool_call>

The name of a tag is the name of a parameter or of a property; the entries of a list are `item`s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from service.parsers.arguments import Element, Schema, arguments_of
from service.parsers.markers import NAMESPACE

BLOCK = "tool_call"
INVOKE = "invoke"
MAX_DEPTH = 128
MAX_TAG_CHARS = 1024
_INVOKE = re.compile(rf"{INVOKE}\s+name\s*=\s*(?:\"([^\"]+)\"|'([^']+)'|([^\s\"']+))\s*")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call. arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolBlock:
    """Reads the inside of one block, piece by piece, each either the namespace marker or text.

    What is not well-formed ends the reading: calls that were complete by then stand, the rest is left out.
    done: nothing more will be read.
    """

    def __init__(self, parameters: Mapping[str, Schema]) -> None:
        """parameters: the JSON schema of each tool's arguments, by the tool's name."""
        self.done = False
        self._parameters = parameters
        self._open: list[Element] = []
        self._tag: list[str] | None = None  # behind a marker: what there is of the tag
        self._num_tag_chars = 0

    def push(self, piece: str) -> ToolCall | None:
        """The call that is complete with this piece: there is at most one, since each takes several markers."""
        if self.done:
            return None
        if piece == NAMESPACE:
            if self._tag is not None:
                self.done = True
            self._tag, self._num_tag_chars = [], 0
            return None
        if self._tag is None:
            self._add_text(piece)
            return None
        return self._read_tag(piece)

    def _read_tag(self, piece: str) -> ToolCall | None:
        assert self._tag is not None
        inside, end, text = piece.partition(">")
        if not self._tag:
            # Some outputs have white space between the marker and its tag.
            inside = inside.lstrip()
            if not inside and not end:
                return None
        self._tag.append(inside)
        self._num_tag_chars += len(inside)
        if self._num_tag_chars > MAX_TAG_CHARS:
            self.done = True
        if not end or self.done:
            return None
        tag = "".join(self._tag)
        self._tag = None
        call = None
        if tag.startswith("</"):
            call = self._close(tag[2:])
        else:
            self._begin(tag)
        if text and not self.done:
            self._add_text(text)
        return call

    def _begin(self, tag: str) -> None:
        name = tag[1:].strip()
        if not self._open:
            found = _INVOKE.fullmatch(name)
            name = next(filter(None, found.groups())) if found else ""
        if not tag.startswith("<") or not name or len(self._open) > MAX_DEPTH:
            self.done = True
            return
        self._open.append(Element(name))

    def _close(self, name: str) -> ToolCall | None:
        name = name.strip()
        if not self._open:
            self.done = True  # the block's own end, or no end of anything
            return None
        element = self._open.pop()
        if name != (element.name if self._open else INVOKE):
            self.done = True
            return None
        if self._open:
            self._open[-1].children.append(element)
            return None
        arguments = arguments_of(element, self._parameters.get(element.name, {}))
        return ToolCall(element.name, json.dumps(arguments, ensure_ascii=False))

    def _add_text(self, text: str) -> None:
        if self._open:
            self._open[-1].text.append(text)
