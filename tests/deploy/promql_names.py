"""Which series and labels a PromQL expression names. Enough of the grammar for what this project writes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)?\s*\{([^{}]*)\}")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_WINDOW = re.compile(r"\[[^\]]*\]")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*(S\d+)")
_NAME = re.compile(r"[a-zA-Z_:][\w:]*")
_AGGREGATIONS = {"sum", "max", "min", "count", "avg", "group", "topk"}
_FUNCTIONS = {"rate", "increase", "changes", "histogram_quantile", "label_replace", "vector", "time", "absent"}
_WORDS = _AGGREGATIONS | _FUNCTIONS | {"last_over_time", "and", "or", "unless"}


@dataclass(slots=True)
class Names:
    """series: name (or the regex of a name) -> labels of its matchers.  grouped: labels of by, on and the like.

    made: labels that label_replace writes.
    """

    series: dict[str, set[str]] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)


def names_in(expr: str) -> Names:
    """The names in `expr`. Raises AssertionError at anything that it cannot read."""
    found = Names()
    strings: list[str] = []

    def keep_string(match: re.Match[str]) -> str:
        strings.append(match[0][1:-1])
        return f"S{len(strings) - 1}"

    def take_selector(match: re.Match[str]) -> str:
        matchers = {label: strings[int(text[1:])] for label, text in _MATCHER.findall(match[2])}
        assert len(matchers) == len([part for part in match[2].split(",") if part.strip()]), match[0]
        name = match[1] or matchers.pop("__name__")
        found.series.setdefault(name, set()).update(matchers)
        return " "

    def take_grouping(match: re.Match[str]) -> str:
        found.grouped.update(label.strip() for label in match[2].split(",") if label.strip())
        return " "

    rest = _STRING.sub(keep_string, expr)
    for call in re.finditer(r"label_replace\(", rest):
        # The label that it writes is the first string behind the first argument.
        depth, index = 1, call.end()
        while not (depth == 1 and rest[index] == ","):
            depth += {"(": 1, ")": -1}.get(rest[index], 0)
            index += 1
        label = re.match(r",\s*S(\d+)", rest[index:])
        assert label is not None
        found.made.add(strings[int(label[1])])
    rest = _GROUPING.sub(take_grouping, _SELECTOR.sub(take_selector, _WINDOW.sub(" ", rest)))
    for name in _NAME.findall(re.sub(r"\b\d[\w.]*|\bS\d+\b", " ", rest)):
        if name not in _WORDS:
            found.series.setdefault(name, set())
    return found
