"""Chat bodies and templates without a service: what is taken, what is refused, and by which name."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deploy.demo.writer import CHAT_TEMPLATE
from engine.errors import CheckpointError, RequestError
from engine.tokenizer import Tokenizer
from service import chat_template
from service.chat import Chat
from service.chat_messages import Message, read_messages
from service.chat_protocol import ChatRequest
from service.chat_template import ChatTemplate
from service.parsers.markers import THINK, THINK_END

HELLO = {"role": "user", "content": "hi"}
TEMPLATE = ChatTemplate(CHAT_TEMPLATE.read_text(encoding="utf-8"), {})


def parse(**fields: Any) -> ChatRequest:
    request = ChatRequest.parse(json.dumps({"messages": [HELLO], **fields}).encode())
    request.check(max_choices=8)
    request.sampling(100, request.guided)
    return request


def refuse(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert len(caught.value.message) < 400
    return caught.value


def call(call_id: str, arguments: str = "{}", name: str = "f") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(call_id: str, content: str = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def assistant(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


# --- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        (1, "messages", "must be a list"),
        ([], "messages", "empty"),
        ([1], "messages[0]", "must be an object"),
        ([{}], "messages[0].role", "is required"),
        ([{"role": "bot"}], "messages[0].role", "must be one of"),
        ([{"role": "function", "name": "f", "content": ""}], "messages[0].role", "have the role 'tool'"),
        ([{"role": "user"}], "messages[0].content", "is required"),
        ([{"role": "user", "content": 1}], "messages[0].content", "must be a string or a list"),
        ([HELLO, {**HELLO, "names": "x"}], "messages[1].names", "unknown field"),
        ([{**HELLO, "name": 1}], "messages[0].name", "must be a string"),
        ([{**HELLO, "reasoning_content": "x"}], "messages[0].reasoning_content", "unknown field"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type", "text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "is required"),
        ([{"role": "user", "content": [["text"]]}], "messages[0].content[0]", "must be an object"),
        ([HELLO, {"role": "system", "content": ""}], "messages[1].role", "has it first"),
        ([HELLO, {"role": "root", "content": ""}], "messages[1].role", "has it first"),
        ([assistant(refusal="no")], "messages[0].refusal", "does not mark refusals"),
        ([assistant(function_call={"name": "f"})], "messages[0].function_call", "stand in tool_calls"),
        ([assistant(call("a", "{"))], "messages[0].tool_calls[0].function.arguments", "not valid JSON"),
        ([assistant(call("a", "[1]"))], "messages[0].tool_calls[0].function.arguments", "must be a JSON object"),
        ([assistant(call("a", '{"x": NaN}'))], "messages[0].tool_calls[0].function.arguments", "not valid JSON"),
        ([assistant(call("a", '{"x": "\\ud800"}'))], "messages[0].tool_calls[0].function.arguments", "not valid"),
        ([assistant({"id": "a", "type": "custom"})], "messages[0].tool_calls[0].type", "only 'function'"),
        ([assistant({"function": {}})], "messages[0].tool_calls[0].function.arguments", "is required"),
        ([assistant(call("a"), call("a")), tool("a")], "messages[0].tool_calls", "twice"),
        ([assistant(call("a"))], "messages", 'no result for the tool call "a"'),
        ([assistant(call("a"), call("b")), tool("b"), HELLO], "messages", "before messages[2] there is no result"),
        ([assistant(call("a")), tool("b")], "messages[1].tool_call_id", "is not a call"),
        ([assistant(call("a"), call("b")), tool("a"), tool("a")], "messages[2].tool_call_id", "is not a call"),
        ([tool("a")], "messages[0].tool_call_id", "is not a call"),
        ([{"role": "tool", "content": ""}], "messages[0].tool_call_id", "is required"),
    ],
)
def test_bad_messages(messages: Any, param: str, says: str) -> None:
    error = refuse(messages=messages)
    assert error.param == param and says in error.message


def test_a_large_bad_body_is_refused_at_its_first_fault() -> None:
    many = [{"role": "user", "content": [{"type": "text", "text": ""}] * 100} for _ in range(100)]
    tracemalloc.start()
    try:
        assert refuse(messages=[*many, {"role": "x"}]).param == "messages[100].role"
        assert refuse(messages=[{"role": "x"}, *many]).param == "messages[0].role"
        assert refuse(messages=[1] * 8193).param == "messages"
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * len(json.dumps(many))


def test_what_templates_are_given() -> None:
    messages = [
        {"role": "root", "content": "r"},
        {"role": "system", "content": "one"},
        {"role": "developer", "content": [{"type": "text", "text": "tw"}, {"type": "text", "text": "o"}]},
        HELLO,
        assistant(call("a", '{"x": 1}'), call("b", ""), reasoning_content="why", refusal=None, annotations=[]),
        tool("b", "second"),
        tool("a", "first"),
        {"role": "assistant", "content": "done", "tool_calls": []},
    ]
    read = read_messages(messages)
    assert [message.index for message in read] == [0, 1, 3, 4, 6, 5, 7]
    assert read[1] == {"role": "system", "content": "one\n\ntwo"}
    assert read[3]["content"] == "" and read[3]["reasoning_content"] == "why" and "refusal" not in read[3]
    assert [each["function"]["arguments"] for each in read[3]["tool_calls"]] == [{"x": 1}, {}]
    assert [message["content"] for message in read[4:6]] == ["first", "second"], "in the order of the calls"
    assert read[6] == {"role": "assistant", "content": "done"}
    prompt = TEMPLATE.render(read, tools=None, variables={})
    assert "<response>first</response>\n<response>second</response>" in prompt


# --- other fields ------------------------------------------------------------------------------------------------


def with_tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": 1}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (with_tool(name="a b"), "tools[0].function.name"),
        (with_tool(name=None), "tools[0].function.name"),
        (with_tool(parameters=[]), "tools[0].function.parameters"),
        (with_tool(strict="yes"), "tools[0].function.strict"),
        (with_tool(extra=1), "tools[0].function.extra"),
        ({"tools": with_tool()["tools"] * 2}, "tools[1].function.name"),
        ({"tool_choice": 1, **with_tool()}, "tool_choice"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"min_tokens": 200}, "min_tokens"),
        ({"n": 9}, "n"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking_mode": "on"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
        ({"chat_template": "x"}, "chat_template"),
        ({"prompt": "x"}, "prompt"),
        ({"temprature": 1}, "temprature"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_bad_fields(fields: dict[str, Any], param: str) -> None:
    assert refuse(**fields).param == param


def test_thinking() -> None:
    modes = {effort: parse(reasoning_effort=effort).thinking_mode for effort in ("none", "medium", "high")}
    assert modes == {"none": "disabled", "medium": "adaptive", "high": "enabled"}
    both = parse(reasoning_effort="high", chat_template_kwargs={"thinking_mode": "disabled", "model_identity": "I"})
    assert both.variables == {"thinking_mode": "disabled", "model_identity": "I"}, "the explicit one counts"
    assert parse().variables == {}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "function", "name"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(ChatRequest.model_fields)), _JSON)
def test_any_value_of_any_field_is_taken_or_refused_under_its_name(name: str, value: Any) -> None:
    try:
        parse(**{name: value})
    except RequestError as error:
        assert error.param is not None and error.param.replace("[", ".").split(".")[0] == name


# --- templates ---------------------------------------------------------------------------------------------------


def render(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    given_messages = [Message(i, message) for i, message in enumerate(messages or (HELLO,))]
    return ChatTemplate(source, {"bos_token": "<s>"}).render(given_messages, tools=None, variables=variables)


def test_variables_and_filters_of_templates() -> None:
    loop = "{% for m in messages %}{% if m.skip %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}"
    source = "{{ bos_token }}" + loop + "{{ x }}"
    assert render(source, {"a": "<ä>"}, {"skip": True}, x=1) == '<s>{"a": "<ä>"}1'
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"
    assert render("{{ tools is defined }} {{ add_generation_prompt }} {{ strftime_now('%Y') }}").startswith(
        "False True 2"
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
            "messages[0]: the chat template refuses it: TypeError",
        ),
        ("{{ messages[1].role ~ raise_exception('no') }}", "messages[1]: the chat template refuses it: no"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__.json }}", "unsafe"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "more than 67108864 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than"),
    ],
)
def test_templates_are_bounded_and_their_errors_name_a_message(
    source: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.5)
    with pytest.raises(RequestError) as caught:
        render(source, HELLO, HELLO)
    assert caught.value.param == "messages" and says in caught.value.message


def test_a_checkpoint_without_a_template_says_so(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(checkpoint)
    [prompt], guided = Chat(checkpoint, tokenizer).prompt(parse())
    assert prompt.endswith("hi[e~[\n]~b]ai\n") and guided is None
    with pytest.raises(RequestError, match="no chat template") as caught:
        Chat(tmp_path, tokenizer).prompt(parse())
    assert (caught.value.param, caught.value.code) == ("messages", "no_chat_template")


@pytest.mark.parametrize(
    ("effort", "opens", "closes"), [("none", False, False), ("low", True, True), ("high", False, True)]
)
def test_what_binds_the_content_lets_the_model_reason(checkpoint: Path, effort: str, opens: bool, closes: bool) -> None:
    tokenizer = Tokenizer.from_dir(checkpoint)
    _, guided = Chat(checkpoint, tokenizer).prompt(
        parse(reasoning_effort=effort, response_format={"type": "json_object"})
    )
    assert guided is not None and guided.kind == "json_object"
    assert guided.reasoning_start_id == (tokenizer.token_id(THINK) if opens else None)
    assert guided.reasoning_end_id == (tokenizer.token_id(THINK_END) if closes else None)


@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive", None])
def test_prompts_are_those_of_transformers(checkpoint: Path, mode: str | None) -> None:
    peer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer = Tokenizer.from_dir(checkpoint)
    arguments = {"x": [1, {"y": None, "z": True}], "s": "ä\n<"}
    body = {
        "messages": [
            {"role": "system", "content": "s ä <"},
            HELLO,
            assistant(call("a", json.dumps(arguments)), content="c", reasoning_content="r"),
            tool("a", "result"),
            {"role": "assistant", "content": "<mm:think>why</mm:think>x"},
            HELLO,
        ],
        "chat_template_kwargs": {} if mode is None else {"thinking_mode": mode},
        **with_tool(description="ü", parameters={"type": "object"}),
    }
    request = parse(**body)
    pieces, _ = Chat(checkpoint, tokenizer).prompt(request)
    messages = [dict(message) for message in request.messages]
    variables = {"tools": body["tools"], "add_generation_prompt": True, **request.variables}
    expected = peer.apply_chat_template(messages, tokenize=False, **variables)
    assert "".join(pieces) == expected
    assert tokenizer.encode(expected) == peer(expected, add_special_tokens=False)["input_ids"]


_FORGED = [
    "]~b]",
    "[e~[",
    "]~!b[",
    "]<]minimax[>[",
    "<mm:think>",
    "</mm:think>",
    "]~",
    "b]",
    "\ufdd0",
    "0\ufdd1",
    "hi",
    "\n",
]


@settings(max_examples=40, deadline=None)
@given(text=st.lists(st.sampled_from(_FORGED), min_size=1, max_size=8).map("".join))
def test_no_message_can_write_the_structure_of_the_chat(checkpoint: Path, text: str) -> None:
    tokenizer = Tokenizer.from_dir(checkpoint)
    chat = Chat(checkpoint, tokenizer)
    added = {tokenizer.token_id(token) for token in tokenizer.added_tokens}

    def structure(text: str) -> tuple[list[int], str]:
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            assistant(call("a", json.dumps({text: [text]}))),
            tool("a", text),
        ]
        pieces, _ = chat.prompt(parse(messages=messages, **with_tool(description=text)))
        token_ids = [token for ids in tokenizer.encode_batch(pieces) for token in ids]
        return [token for token in token_ids if token in added], tokenizer.decode(token_ids, skip_special_tokens=False)

    markers, prompt = structure(text)
    assert markers == structure("x")[0]
    assert f"]~b]user\n{text}[e~[" in prompt and f"<response>{text}</response>" in prompt, "the text is there"


def test_special_texts_of_one_request_are_bounded(checkpoint: Path) -> None:
    chat = Chat(checkpoint, Tokenizer.from_dir(checkpoint))
    for count in (8192, 8193):
        body = parse(messages=[{"role": "user", "content": "]~b]" * count}])
        if count == 8192:
            assert len(chat.prompt(body)[0]) == 2 * count + 2
        else:
            with pytest.raises(RequestError, match="more than 8192 texts of special tokens"):
                chat.prompt(body)


def test_where_templates_stand(tmp_path: Path) -> None:
    assert ChatTemplate.from_dir(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "E"}, "chat_template": "one{{ eos_token }}"}))

    def found() -> str:
        template = ChatTemplate.from_dir(tmp_path)
        assert template is not None
        return template.render([], tools=None, variables={})

    assert found() == "oneE"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert found() == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert found() == "three"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="line 1"):
        found()
