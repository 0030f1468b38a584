"""Grammars of tool calls: whatever they let through is a call that fits its schema, and can be written at all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.guided import Grammars, Guide
from engine.tokenizer import Tokenizer
from engine.types import GuidedSpec
from service.parsers.markers import NAMESPACE
from service.parsers.message import MessageParser, News
from service.parsers.tools import ToolCall
from service.tool_grammar import tool_grammar

MAX_TOKENS = 500


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_dir(checkpoint)


@pytest.fixture(scope="module")
def grammars(checkpoint: Path, tokenizer: Tokenizer) -> Grammars:
    return Grammars(checkpoint, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids)


class Walker:
    """A model that takes any token that it may, and often the one that ends values."""

    def __init__(self, grammars: Grammars, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._grammars, self._tokenizer, self._rng = grammars, tokenizer, rng
        self._mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)

    def calls(self, tools: dict[str, Any], max_calls: int | None) -> list[ToolCall] | None:
        """What a message holds that a grammar bound to calls; None when it is too long."""
        news = self.message(tools, max_calls=max_calls)
        assert news is None or not (news.content or news.reasoning)
        return None if news is None else news.calls

    def message(self, tools: dict[str, Any], **options: Any) -> News | None:
        namespace = self._tokenizer.token_id(NAMESPACE)
        assert namespace is not None
        guide = Guide(self._grammars, GuidedSpec("grammar", tool_grammar(tools, namespace, **options)))
        parser = MessageParser(in_reasoning=False, tools=tools)
        tokens: list[int] = []
        while len(tokens) < MAX_TOKENS:
            guide.fill(self._mask)
            assert guide.error is None
            bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
            token = self._rng.choice(bits)
            if self._rng.random() < 0.7:
                token = next((each for each in (namespace, *self._tokenizer.eos_token_ids) if each in bits), token)
            if token in self._tokenizer.eos_token_ids:
                parser.push(self._tokenizer.decode(tokens))
                parser.finish()
                return parser.news()
            tokens.append(token)
            guide.consume(token)
        return None


_LEAVES: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"type": "boolean"},
    {"type": ["null", "boolean"]},
    {"enum": ["a b", "<c>", 'd"']},
    {"const": 7},
    {"type": "string", "maxLength": 4},
    {"$ref": "#/$defs/pair"},
]
_SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.sampled_from(_LEAVES),
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=2).map(
            lambda properties: {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
        ),
    ),
    max_leaves=4,
)
_DEFINITIONS = {
    "pair": {
        "type": "object",
        "properties": {"x": {"type": "boolean"}, "next": {"$ref": "#/$defs/pair"}},
        "required": ["x"],
    }
}


@settings(max_examples=40, deadline=None)
@given(schema=_SCHEMAS, rng=st.randoms(use_true_random=False))
def test_whatever_the_grammar_lets_through_fits_the_schema(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], rng: random.Random
) -> None:
    parameters = {"type": "object", "properties": {"p": schema, "q": {"type": "boolean"}}, "required": ["p"]}
    parameters["$defs"] = _DEFINITIONS
    calls = Walker(grammars, tokenizer, rng).calls({"f": parameters}, 1)
    assume(calls is not None)
    assert calls is not None and [call.name for call in calls] == ["f"]
    jsonschema.validate(json.loads(calls[0].arguments), parameters)


def test_one_call_or_more(grammars: Grammars, tokenizer: Tokenizer) -> None:
    walker = Walker(grammars, tokenizer, random.Random(0))
    found = [walker.calls({"f": {}, "g": {}}, None) or [] for _ in range(20)]
    assert {call.name for calls in found for call in calls} == {"f", "g"}
    assert {1, 2} <= {len(calls) for calls in found} and min(map(len, found)) > 0


def test_free_text_and_then_calls_or_none(grammars: Grammars, tokenizer: Tokenizer) -> None:
    walker = Walker(grammars, tokenizer, random.Random(0))
    schema = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
    found = [walker.message({"f": schema}, max_calls=None, free_text=True) for _ in range(20)]
    messages = [message for message in found if message is not None]
    assert {(bool(message.content), bool(message.calls)) for message in messages} >= {(False, True), (True, True)}
    for call in (call for message in messages for call in message.calls):
        jsonschema.validate(json.loads(call.arguments), schema)


def test_a_call_or_a_json_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    walker = Walker(grammars, tokenizer, random.Random(0))
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    found = [walker.message({"f": {}}, max_calls=1, otherwise=schema) for _ in range(20)]
    messages = [message for message in found if message is not None]
    assert {len(message.calls) for message in messages} == {0, 1}
    for message in messages:
        assert bool(message.content) != bool(message.calls)
        if message.content:
            jsonschema.validate(json.loads(message.content), schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a<b": {}}}, "cannot name"),
        ({"properties": {" a": {}}}, "cannot name"),
        ({"required": [""]}, "cannot name"),
        ({"properties": {"p": {"type": "integer", "minimum": 2, "maximum": 1}}, "required": ["p"]}, "Unsatisfiable"),
        ({"properties": {f"p{i}": {} for i in range(5000)} | {"q": {"anyOf": [{} for _ in range(5000)]}}}, "too much"),
    ],
)
def test_what_has_no_grammar_is_refused(grammars: Grammars, schema: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        grammars.matcher(GuidedSpec("grammar", tool_grammar({"f": schema}, 5, max_calls=1)))
