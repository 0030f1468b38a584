"""Messages from generated text: any way to cut the text gives the same, no marker gets out, arguments fit schemas."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploy.demo.writer import CHAT_TEMPLATE
from service.chat_messages import Message
from service.chat_template import ChatTemplate
from service.parsers.markers import MARKERS, THINK, THINK_END
from service.parsers.markers import NAMESPACE as NS
from service.parsers.message import MessageParser, News, starts_in_reasoning

TEMPLATE = ChatTemplate(CHAT_TEMPLATE.read_text(encoding="utf-8"), {})
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
CALL = f'{NS}<tool_call>\n{NS}<invoke name="weather">{NS}<city>Paris{NS}</city>{NS}<days>3{NS}</days>{NS}</invoke>\n'
CALL_END = f"{NS}</tool_call>"


def read(*pieces: str, in_reasoning: bool = False, tools: Any = None, max_calls: int | None = None) -> News:
    parser = MessageParser(in_reasoning=in_reasoning, tools=tools, max_calls=max_calls)
    message = News()
    for piece in pieces:
        parser.push(piece)
        add(message, parser.news())
    parser.finish()
    add(message, parser.news())
    return message


def add(message: News, news: News) -> None:
    message.reasoning += news.reasoning
    message.content += news.content
    message.calls += news.calls


def calls(text: str, parameters: Any = WEATHER, **options: Any) -> list[tuple[str, Any]]:
    message = read(text, tools={"weather": parameters}, **options)
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


def arguments(inside: str, parameters: Any) -> Any:
    """What one call with this between its tags gives. The namespace marker is written as @ here."""
    [(_, given_arguments)] = calls(
        f'@<tool_call>@<invoke name="weather">{inside}@</invoke>'.replace("@", NS), parameters
    )
    return given_arguments


# --- reasoning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "in_reasoning", "reasoning", "content"),
    [
        ("Hi", False, "", "Hi"),
        (f"{THINK}why{THINK_END}Hi", False, "why", "Hi"),
        (f"why{THINK_END}Hi", True, "why", "Hi"),
        (f"{THINK_END}Hi", False, "", "Hi"),  # a stray one, as after tool results
        (f"{THINK_END}Hi", True, "", "Hi"),
        ("never closed", True, "never closed", ""),
        (f"{THINK}why", True, "why", ""),
        (f"Hi{THINK}more{THINK_END} there", False, "more", "Hi there"),
        ("a < b <m </mm:th", False, "", "a < b <m </mm:th"),
        (f"a{THINK_END}\n\nHi", True, "a", "\n\nHi"),
    ],
)
def test_reasoning(text: str, in_reasoning: bool, reasoning: str, content: str) -> None:
    message = read(text, in_reasoning=in_reasoning)
    assert (message.reasoning, message.content, message.calls) == (reasoning, content, [])


def test_only_the_prompts_end_says_how_the_answer_begins() -> None:
    instructions = f"wrap it in {THINK}{THINK_END} tags[e~[\n]~b]ai\n"
    assert starts_in_reasoning(instructions + THINK)
    assert not starts_in_reasoning(instructions) and not starts_in_reasoning(instructions + THINK_END)


# --- tool calls --------------------------------------------------------------------------------------------------


def test_a_call_with_content_before_it() -> None:
    message = read(f"{THINK}look{THINK_END}Let me see.{CALL}{CALL_END}dropped", tools={"weather": WEATHER})
    assert (message.reasoning, message.content) == ("look", "Let me see.")
    [call] = message.calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris", "days": 3})


def test_parallel_calls_and_their_limit() -> None:
    other = f"{NS}<invoke name='other'>{NS}<x>1{NS}</x>{NS}</invoke>\n"
    text = CALL + other + f"{NS}<invoke name=weather>{NS}</invoke>{CALL_END}"
    expected = [("weather", {"city": "Paris", "days": 3}), ("other", {"x": "1"}), ("weather", {})]
    assert calls(text) == expected
    assert calls(text, max_calls=1) == expected[:1]


@pytest.mark.parametrize(
    ("text", "num_calls"),
    [
        (CALL + CALL_END, 1),
        (CALL, 1),  # the block's end is missing
        (CALL + f'{NS}<invoke name="weather">{NS}<city>Par', 1),  # cut off: an incomplete call is none
        (CALL + f"{NS} \n<invoke name = 'weather'>{NS}\n</invoke>", 2),
        (CALL + f"{NS}{NS}<invoke name=weather>{NS}</invoke>", 1),
        (CALL + f"{NS}<invoke>{NS}</invoke>", 1),
        (CALL + f"{NS}<invoke name=weather>{NS}<a>{NS}</b>{NS}</invoke>", 1),
        (CALL + f"{NS}<invoke name=weather>{NS}<a>{NS}</invoke>", 1),
        (CALL + f"{NS}<invoke name=weather>{NS}<>{NS}</>{NS}</invoke>", 1),
        (CALL + f"{NS}<invoke name=weather>{(NS + '<a>') * 200}", 1),
        (CALL + f"{NS}<{'x' * 2000}>", 1),
        (CALL.replace(f"{NS}<tool_call>\n", ""), 1),  # no block around it
        (f"thinking, then{CALL}", 1),
        (f"{NS}<tool_call>{CALL_END}", 0),
    ],
)
def test_what_is_not_well_formed_ends_the_block(text: str, num_calls: int) -> None:
    assert [name for name, _ in calls(text)] == ["weather"] * num_calls


def test_calls_out_of_open_reasoning() -> None:
    message = read(f"I should look{CALL}", in_reasoning=True, tools={"weather": WEATHER})
    assert message.reasoning == "I should look" and len(message.calls) == 1 and not message.content


def test_a_tool_may_write_the_markers_of_reasoning() -> None:
    text = f"{NS}<tool_call>{NS}<invoke name=weather>{NS}<city>{THINK}x{THINK_END}{NS}</city>{NS}</invoke>"
    assert calls(text) == [("weather", {"city": f"{THINK}x{THINK_END}"})]


def test_without_tools_only_the_marker_is_taken_out() -> None:
    message = read(CALL)
    assert message.content == CALL.replace(NS, "") and not message.calls


def test_a_namespace_that_begins_no_block_is_taken_out_alone() -> None:
    for text, content in ((f"a{NS}b", "ab"), (f"a{NS} <tool_x>b", "a <tool_x>b"), (f"a{NS}<tool_", "a")):
        assert read(text, tools={"weather": WEATHER}).content == content


# --- arguments ---------------------------------------------------------------------------------------------------


def one(kind: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": kind if isinstance(kind, dict) else {"type": kind}}}


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("string", " 5 ", " 5 "),
        ("string", "null", "null"),
        ("string", "", ""),
        ("integer", " 5\n", 5),
        ("integer", "-7", -7),
        ("integer", "5.0", 5),
        ("integer", "five", "five"),
        ("integer", "9" * 5000, "9" * 5000),
        ("number", "2.5e3", 2500.0),
        ("number", "3", 3),
        ("number", "1e999", "1e999"),
        ("number", "NaN", "NaN"),
        ("boolean", "true", True),
        ("boolean", "False", False),
        ("boolean", "yes", "yes"),
        ("null", "Null", None),
        ("null", "none", "none"),
        (["integer", "null"], "null", None),
        (["string", "null"], "none", "none"),
        (["string", "integer"], "5", 5),
        ("array", "", []),
        ("array", "[1, 2]", [1, 2]),
        ("array", "[NaN]", ["[NaN]"]),
        ("object", " ", {}),
        ("object", '{"a": [1]}', {"a": [1]}),
        ("object", "[1]", "[1]"),
        ({}, "5", "5"),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"const": 5}, "5", 5),
        ({"anyOf": [{"type": "null"}, {"type": "number"}]}, "1.5", 1.5),
        ({"type": "array", "items": {"type": "integer"}}, "5", [5]),
        ({"$ref": "#/definitions/loop"}, "5", "5"),
        (True, "5", "5"),
    ],
)
def test_leaves_are_read_by_their_schema(kind: Any, text: str, expected: Any) -> None:
    schema = one(kind) | {"definitions": {"loop": {"$ref": "#/definitions/loop"}}}
    if kind is True:
        schema["properties"]["x"] = True
    value = arguments(f"@<x>{text}@</x>".replace("@", NS), schema)["x"]
    assert (value, type(value)) == (expected, type(expected))


def test_nested_elements() -> None:
    schema = {
        "type": "object",
        "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}}}},
        "properties": {
            "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}},
            "free": {},
            "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}},
            "tags": {"type": "array", "items": {"type": "integer"}},
        },
    }
    inside = (
        "@<points>\n@<item>@<x>1@</x>@<y>2@</y>@</item>@<item>@<x>3@</x>@</item>@</points>"
        "@<free>@<item>1@</item>@<item>@<k>v@</k>@</item>@</free>"
        "@<pair>@<item>1@</item>@<item>1@</item>@</pair>"
        "@<map>@<a>1@</a>note@</map>"
        "@<tags>1@</tags>@<tags>2@</tags>"
    )
    assert arguments(inside.replace("@", NS), schema) == {
        "points": [{"x": 1, "y": 2}, {"x": 3}],
        "free": ["1", {"k": "v"}],
        "pair": [1, "1"],
        "map": {"a": 1, "$text": "note"},
        "tags": [1, 2],
    }


_SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean")]),
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items}),
        st.dictionaries(st.text("abc_", min_size=1, max_size=3), inner, max_size=3).map(
            lambda properties: {"type": "object", "properties": properties, "additionalProperties": False}
        ),
    ),
    max_leaves=6,
)


def _value_of(data: Any, schema: dict[str, Any]) -> Any:
    kind = schema["type"]
    if kind == "array":
        return [_value_of(data, schema["items"]) for _ in range(data.draw(st.integers(0, 2)))]
    if kind == "object":
        return {name: _value_of(data, below) for name, below in schema["properties"].items()}
    return data.draw(
        {
            "string": st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
            "integer": st.integers(-(10**20), 10**20),
            "number": st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False),
            "boolean": st.booleans(),
        }[kind]
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_calls_that_the_template_writes_are_read_back(data: Any) -> None:
    schema = {"type": "object", "properties": data.draw(st.dictionaries(st.text("xyz", min_size=1), _SCHEMAS))}
    values = _value_of(data, schema)
    jsonschema.validate(values, schema)
    call = {"function": {"name": "weather", "arguments": values}}
    message = Message(0, {"role": "assistant", "content": "", "tool_calls": [call]})
    prompt = TEMPLATE.render([message], tools=None, variables={})
    [(name, read_back)] = calls(prompt.partition(f"]~b]ai\n{THINK_END}")[2], schema)
    assert (name, json.dumps(read_back)) == ("weather", json.dumps(values))


# --- any cut -----------------------------------------------------------------------------------------------------

_FRAGMENTS = [
    *MARKERS,
    "<tool_call>",
    "</tool_call>",
    '<invoke name="weather">',
    "<invoke name=other>",
    "</invoke>",
    "<city>",
    "</city>",
    "<days>",
    "</days>",
    "<item>",
    "</item>",
    " ",
    "\n",
    ">",
    "</mm:",
    "think>",
    "]<]mini",
    "max[>[",
    "<",
    "]",
    "5",
    "né😀",
    CALL,
    CALL_END,
]


@settings(max_examples=400, deadline=None)
@example(text=f"</mm:{THINK_END}think>]<]mini{NS}max[>[", cuts={3, 9}, in_reasoning=False, has_tools=True)
@example(text=f"</mm:{THINK_END}think>>", cuts=set(range(20)), in_reasoning=False, has_tools=False)
@given(
    text=st.lists(st.sampled_from(_FRAGMENTS), max_size=12).map("".join),
    cuts=st.sets(st.integers(0, 200)),
    in_reasoning=st.booleans(),
    has_tools=st.booleans(),
)
def test_any_cut_gives_the_same_message_and_no_marker_gets_out(
    text: str, cuts: set[int], in_reasoning: bool, has_tools: bool
) -> None:
    tools = {"weather": WEATHER} if has_tools else None
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    whole = read(text, in_reasoning=in_reasoning, tools=tools)
    assert read(*pieces, in_reasoning=in_reasoning, tools=tools) == whole
    assert read(*text, in_reasoning=in_reasoning, tools=tools) == whole
    assert not [marker for marker in MARKERS if marker in whole.reasoning or marker in whole.content]
    for call in whole.calls:
        assert isinstance(json.loads(call.arguments), dict)
    if not any(marker in text for marker in MARKERS):
        assert whole.reasoning + whole.content == text, "nothing is lost"


@given(st.lists(st.sampled_from(_FRAGMENTS), max_size=30).map("".join))
def test_what_is_given_out_early_is_all_that_is_certain(text: str) -> None:
    """A reader waits for no more than the longest marker, outside of tool calls."""
    parser = MessageParser(in_reasoning=False)
    parser.push(text)
    early = parser.news()
    parser.finish()
    late = parser.news()
    assert len(late.reasoning + late.content) < max(map(len, MARKERS))
    assert not late.calls and early.calls == []
