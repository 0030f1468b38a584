"""The grammar of a message that has to call a tool, in llguidance's Lark syntax, over MiniMax-M3's call format.

Parameters come in the order of the schema, the required ones always. A value is what its schema says, as far as a
context-free grammar can tell: types, enums, bounds, nested objects and lists, references; not `pattern`, `format` or
`uniqueItems`. Objects of any form are written as JSON, which the parser takes too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.errors import RequestError
from engine.guided import BLANKS
from service.parsers.arguments import ITEM, Schema, Schemas, types_of
from service.parsers.tools import BLOCK, INVOKE, MAX_DEPTH, MAX_TAG_CHARS

_TERMINALS = r"""
TEXT: /(?s:.+)/
INTEGER: /-?(0|[1-9][0-9]{0,18})/
NUMBER: /-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?/
"""
_LEAVES = {
    "string": "TEXT?",
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": '"true" | "false"',
    "null": '"null"',
}
_TAG_NAME = re.compile(rf"[^\s<>/][^<>]{{0,{MAX_TAG_CHARS - 1}}}")
_MAX_RULES = 4096
_MAX_COUNT = 256
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Rules are found again by the identity of their schema.
_ANY: Schema = {}


def tool_grammar(
    tools: Mapping[str, Schema],
    namespace_id: int,
    *,
    max_calls: int | None,
    free_text: bool = False,
    otherwise: Schema | None = None,
) -> str:
    """One call or more of these tools, and nothing else.

    tools: the schema of each one's arguments, by name.  namespace_id: token of the namespace marker.  max_calls: None:
    any number.  free_text: any text may stand before the calls, or in place of them.  otherwise: schema of a JSON text
    that may stand in place of them.  Raises RequestError for a parameter that the format has no way to write.
    """
    marker = f"<[{namespace_id}]>"
    rules: list[str] = []
    calls = []
    for name, parameters in tools.items():
        inside = _Rules(Schemas(parameters), marker, rules).members(parameters, depth=0)
        begin = _quote(f'<{INVOKE} name="{name}">')
        calls.append(f"{marker} {begin} {inside} {marker} {_quote(f'</{INVOKE}>')}")
    repeat = "" if max_calls == 1 else "+"
    block = f"block: {marker} {_quote(f'<{BLOCK}>')} (NEWLINE call){repeat} NEWLINE {marker} {_quote(f'</{BLOCK}>')}"
    start = ["start: TEXT? block?" if free_text else "start: block"]
    if otherwise is not None:
        text = {**otherwise, "x-guidance": {"whitespace_pattern": BLANKS}}
        start = ["start: block | text", f"text: %json {json.dumps(text)}"]
    return "\n".join([*start, block, "call: " + " | ".join(calls), *rules, r'NEWLINE: "\n"', _TERMINALS.strip()])


class _Rules:
    """Appends one rule for each schema that is met, so that references to oneself end."""

    def __init__(self, schemas: Schemas, marker: str, rules: list[str]) -> None:
        self._schemas = schemas
        self._marker = marker
        self._rules = rules
        self._names: dict[int, str] = {}

    def members(self, schema: Schema, *, depth: int) -> str:
        """The parameters of a call, or the properties of an object."""
        properties: dict[str, Any] = {}
        required: set[str] = set()
        for variant in self._schemas.variants(schema):
            if isinstance(below := variant.get("properties"), dict):
                properties = below | properties
            if isinstance(names := variant.get("required"), list):
                required |= {name for name in names if isinstance(name, str)}
        parts = []
        for name in [*properties, *sorted(required - properties.keys())]:
            element = self._element(name, properties.get(name), depth=depth)
            parts.append(f"({element})" if name in required else f"({element})?")
        return " ".join(parts) or '""'

    def _element(self, name: str, schema: Any, *, depth: int) -> str:
        if not _TAG_NAME.fullmatch(name):
            raise RequestError(
                f"a tool has the parameter {name[:80]!r}, which the model's call format cannot name", param="tools"
            )
        marker = self._marker
        return f"{marker} {_quote(f'<{name}>')} {self._value(schema, depth=depth + 1)} {marker} {_quote(f'</{name}>')}"

    def _value(self, schema: Any, *, depth: int) -> str:
        """The name of the rule for a value."""
        if not isinstance(schema, dict):
            schema = _ANY
        name = self._names.get(id(schema))
        if name is None:
            if depth > MAX_DEPTH or len(self._rules) >= _MAX_RULES:
                raise RequestError(
                    f"the schemas of the tools are nested more than {MAX_DEPTH} deep or have more than {_MAX_RULES} "
                    "parts: too much for a tool_choice that asks for a call",
                    param="tools",
                )
            name = self._names[id(schema)] = f"v{len(self._rules)}"
            self._rules.append("")  # taken, before what stands below takes its own
            index = len(self._rules) - 1
            self._rules[index] = f"{name}: " + " | ".join(self._alternatives(schema, depth=depth))
        return name

    def _alternatives(self, schema: Schema, *, depth: int) -> list[str]:
        if isinstance(reference := schema.get("$ref"), str):
            return [self._value(self._schemas.resolve(reference), depth=depth)]
        for key in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(key), list) and parts:
                return [self._value(part, depth=depth) for part in parts]
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values:
            return [_quote(value if isinstance(value, str) else json.dumps(value)) for value in values]
        types = {name for variant in self._schemas.variants(schema) for name in types_of(variant)}
        alternatives = [self._leaf(name, schema) for name in sorted(types & _LEAVES.keys())]
        if "array" in types:
            entry = self._element(ITEM, schema.get("items"), depth=depth)
            alternatives.append(f"({entry}){_counts(schema, 'minItems', 'maxItems') or '*'}")
        if "object" in types:
            has_members = any("properties" in variant for variant in self._schemas.variants(schema))
            alternatives.append(self.members(schema, depth=depth) if has_members else self._json({"type": "object"}))
        return alternatives or [_LEAVES["string"]]

    def _leaf(self, kind: str, schema: Schema) -> str:
        if kind == "string" and (counts := _counts(schema, "minLength", "maxLength")):
            return f"/(?s:.{counts})/"
        bounds = {key: schema[key] for key in _BOUNDS if key in schema} if kind in ("integer", "number") else {}
        return self._json({"type": kind, **bounds}) if bounds else _LEAVES[kind]

    def _json(self, schema: Schema) -> str:
        """A rule for any JSON text of a schema: numbers have no other form here."""
        self._rules.append(f"v{len(self._rules)}: %json {json.dumps(schema)}")
        return f"v{len(self._rules) - 1}"


def _counts(schema: Schema, low_key: str, high_key: str) -> str:
    """The repetition that two bounds of a schema ask for, empty for any; as far as a grammar can count."""
    low, high = schema.get(low_key), schema.get(high_key)
    low = low if isinstance(low, int) and 0 < low <= _MAX_COUNT else 0
    high = high if isinstance(high, int) and low <= high <= _MAX_COUNT else None
    if high is None and not low:
        return ""
    return f"{{{low},{'' if high is None else high}}}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
