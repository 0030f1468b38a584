"""The marker texts of MiniMax-M3's output, found in text that arrives in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterator

THINK = "<mm:think>"
THINK_END = "</mm:think>"
# Stands before every tag of a tool call.
NAMESPACE = "]<]minimax[>["
MARKERS = (THINK, THINK_END, NAMESPACE)

_ANY = re.compile("|".join(map(re.escape, MARKERS)))
_LONGEST = max(map(len, MARKERS))


class Lexer:
    """Cuts text into plain text and markers. The same text gives the same markers however it arrives."""

    def __init__(self) -> None:
        self._held = ""  # may be the start of a marker

    def push(self, text: str) -> Iterator[str]:
        """Plain pieces, never empty, and whole markers, in order."""
        text = self._held + text
        self._held = ""
        begin = 0
        for found in _ANY.finditer(text):
            if found.start() > begin:
                yield text[begin : found.start()]
            yield found.group()
            begin = found.end()
        rest = text[begin:]
        num_held = _num_held(rest)
        if len(rest) > num_held:
            yield rest[: len(rest) - num_held]
        self._held = rest[len(rest) - num_held :]

    def finish(self) -> str:
        """What was held back, since no more text comes."""
        held, self._held = self._held, ""
        return held


def _num_held(text: str) -> int:
    """How many of the last characters may be the start of a marker."""
    for length in range(min(len(text), _LONGEST - 1), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in MARKERS):
            return length
    return 0


class MarkerFree:
    """A text without markers, made of pieces without markers.

    Where a marker was cut out, what stood before and after it can make another one. The character that would complete
    it is left out: that says the same for every way to cut the pieces.
    """

    def __init__(self) -> None:
        self._tail = ""

    def add(self, piece: str) -> str:
        """`piece`, or what may stand of it after all pieces before."""
        text = self._tail + piece
        while found := _ANY.search(text):
            text = text[: found.end() - 1] + text[found.end() :]
        kept = text[len(self._tail) :]
        self._tail = text[-(_LONGEST - 1) :]
        return kept
