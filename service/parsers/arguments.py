"""The arguments of a tool call, from nested elements to JSON, by the tool's JSON schema.

In M3's syntax every leaf is text: only the schema says whether `5` is a number. What does not fit the schema stays
as the model wrote it, so that whoever runs the tool can say what is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# An element of a list.
ITEM = "item"
# Text beside elements.
TEXT_KEY = "$text"

Schema = dict[str, Any]

_INTEGER = re.compile(r"[+-]?[0-9]{1,400}(\.0{1,400})?")
_NUMBER = re.compile(r"[+-]?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?")
_NULLS = frozenset({"null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
_TYPES = ("null", "boolean", "integer", "number", "array", "object", "string")
_NOTHING = object()


@dataclass(slots=True)
class Element:
    """What stands between an opening tag and its closing one."""

    name: str
    text: list[str] = field(default_factory=list)
    children: list[Element] = field(default_factory=list)


def arguments_of(element: Element, parameters: Schema) -> dict[str, Any]:
    """The arguments of a call. parameters: the tool's schema, empty when it has none."""
    return _Reader(Schemas(parameters)).object(element, parameters)


class Schemas:
    """Schemas below one root, where their references point."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def variants(self, schema: Any) -> Iterator[Schema]:
        """The schemas that a value may, or must, fit: through references, anyOf, oneOf and allOf. Each comes once."""
        seen: set[int] = set()
        pending = [schema]
        while pending:
            schema = pending.pop(0)
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            seen.add(id(schema))
            yield schema
            if isinstance(reference := schema.get("$ref"), str):
                pending.append(self.resolve(reference))
            for key in ("anyOf", "oneOf", "allOf"):
                if isinstance(below := schema.get(key), list):
                    pending += below

    def resolve(self, reference: str) -> Any:
        """What a reference within the schema points at; None for any other."""
        head, *path = reference.split("/")
        target: Any = self._root if head == "#" else None
        for part in path:
            key = part.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, dict) else None
        return target


class _Reader:
    """Reads elements by schemas."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas

    def value(self, element: Element, schema: Any) -> Any:
        variants = list(self._schemas.variants(schema))
        types = {name for variant in variants for name in types_of(variant)}
        if element.children:
            return self._nested(element, variants, types)
        text = "".join(element.text)
        if any(text in choices for variant in variants if isinstance(choices := variant.get("enum"), list)):
            return text
        for name in _TYPES[:-1]:
            if name in types and (value := self._leaf(text, name, variants)) is not _NOTHING:
                return value
        if "array" in types and "string" not in types:
            # A single entry without its <item>.
            return [self.value(element, _items(variants, 0))]
        return text

    def object(self, element: Element, schema: Any) -> dict[str, Any]:
        return self._object(element, list(self._schemas.variants(schema)))

    def _leaf(self, text: str, kind: str, variants: list[Schema]) -> Any:
        """`text` as a value of one type, _NOTHING when it is none."""
        word = text.strip()
        if kind == "null":
            return None if word in _NULLS else _NOTHING
        if kind == "boolean":
            return _BOOLEANS.get(word, _NOTHING)
        if kind == "integer":
            return int(word.partition(".")[0]) if _INTEGER.fullmatch(word) else _NOTHING
        if kind == "number":
            if not _NUMBER.fullmatch(word):
                return _NOTHING
            number = int(word) if word.lstrip("+-").isdecimal() else float(word)
            return number if math.isfinite(number) else _NOTHING
        wanted = list if kind == "array" else dict
        if not word:
            return wanted()
        value = _json(word)
        return value if isinstance(value, wanted) else _NOTHING

    def _nested(self, element: Element, variants: list[Schema], types: set[str]) -> Any:
        is_list = all(child.name == ITEM for child in element.children) and not _has_text(element)
        if is_list and ("array" in types or not types & {"object", "array"}):
            return [self.value(child, _items(variants, i)) for i, child in enumerate(element.children)]
        return self._object(element, variants)

    def _object(self, element: Element, variants: list[Schema]) -> dict[str, Any]:
        named: dict[str, list[Element]] = {}
        for child in element.children:
            named.setdefault(child.name, []).append(child)
        value: dict[str, Any] = {}
        for name, children in named.items():
            schema = _property(variants, name)
            if len(children) == 1:
                value[name] = self.value(children[0], schema)
                continue
            below = list(self._schemas.variants(schema))
            is_array = any("array" in types_of(variant) for variant in below)
            value[name] = [
                self.value(child, _items(below, i) if is_array else schema) for i, child in enumerate(children)
            ]
        if _has_text(element):
            value[TEXT_KEY] = "".join(element.text)
        return value


def types_of(schema: Schema) -> set[str]:
    """The JSON types that a schema names, or that its keywords speak of."""
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {name for name in given if isinstance(name, str)}
    values = schema["enum"] if isinstance(schema.get("enum"), list) else []
    values = [*values, schema["const"]] if "const" in schema else values
    types = {_TYPE_NAMES[type(value)] for value in values if type(value) in _TYPE_NAMES}
    if "properties" in schema or "additionalProperties" in schema:
        types.add("object")
    if "items" in schema or "prefixItems" in schema:
        types.add("array")
    return types


_TYPE_NAMES: dict[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def _property(variants: list[Schema], name: str) -> Any:
    for schema in variants:
        properties = schema.get("properties")
        if isinstance(properties, dict) and name in properties:
            return properties[name]
    return next((rest for schema in variants if isinstance(rest := schema.get("additionalProperties"), dict)), None)


def _items(variants: list[Schema], index: int) -> Any:
    for schema in variants:
        first = schema.get("prefixItems")
        if isinstance(first, list) and index < len(first):
            return first[index]
    return next((rest for schema in variants if isinstance(rest := schema.get("items"), dict)), None)


def _has_text(element: Element) -> bool:
    return any(text and not text.isspace() for text in element.text)


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _NOTHING


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
