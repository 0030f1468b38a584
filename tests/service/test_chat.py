"""Chats over real HTTP with the openai client: messages, reasoning, tool calls, whole and streamed.

The served model is random. Where an answer has to be a certain one, a grammar with one sentence forces its tokens.
"""

from __future__ import annotations

import asyncio
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from openai.types import completion_create_params as completion_parameters
from openai.types.chat import completion_create_params as chat_parameters

from engine.tokenizer import Tokenizer
from service import openai_table
from service.parsers.markers import MARKERS, NAMESPACE, THINK, THINK_END
from tests.cluster import Cluster, wait_until
from tests.service.openai_cases import BASE, BY_HAND, CASES, REFUSED, TOLERATED, text

MODEL = "tiny"
TIMEOUT_S = 60.0
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
DISABLED = {"chat_template_kwargs": {"thinking_mode": "disabled"}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                "unit": {"type": "null"},
                "hour": {"type": "integer", "minimum": 1, "maximum": 9},
                "note": {"type": "string", "maxLength": 3},
            },
            "required": ["city"],
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
CALLS = (
    "@<tool_call>\n"
    '@<invoke name="weather">@<city>Rome@</city>@<days>@<item>true@</item>@</days>@</invoke>\n'
    '@<invoke name="clock">@</invoke>\n'
    "@</tool_call>"
)


@pytest.fixture(scope="module")
def url(cluster: Cluster, checkpoint: Path) -> Iterator[str]:
    settings = cluster.settings(checkpoint, served_model_name=MODEL, max_num_seqs=8)
    with cluster.service(settings) as base:
        wait_until(lambda: httpx.get(f"{base}/ready").status_code == 200, timeout_s=30, what="readiness")
        yield base


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_dir(checkpoint)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as made:
        yield made


def post(url: str, status: int = 200, route: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    """The answer, or the error object. A chat says hello unless the body says something."""
    given = {"messages": HELLO, "max_tokens": 4, **body} if "prompt" not in body else body
    response = httpx.post(f"{url}{route}", json=given, timeout=TIMEOUT_S)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer if status == 200 else answer["error"]


def forced(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Fields of a request that is answered with exactly this text, with @ for the namespace marker."""
    parts = []
    rest = text.replace("@", NAMESPACE)
    while rest:
        marker = min(MARKERS, key=lambda each: (rest.find(each) % (len(rest) + 1), each))
        before, found, rest = rest.partition(marker)
        parts += [json.dumps(before, ensure_ascii=False)] if before else []
        parts += [f"<[{tokenizer.token_id(marker)}]>"] if found else []
    return {"structured_outputs": {"grammar": f"start: {' '.join(parts)}"}, "max_tokens": 400, **DISABLED}


# --- text --------------------------------------------------------------------------------------------------------


def test_whole_and_streamed_answers_are_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 12, "seed": 3}
    answer = client.chat.completions.create(**asked, extra_body=DISABLED)
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == MODEL
    assert choice.message.role == "assistant" and choice.message.content and choice.message.tool_calls is None
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    chunks = list(
        client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body=DISABLED
        )
    )
    *parts, last = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert [part.choices[0].delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == choice.message.content
    assert parts[-1].choices[0].finish_reason == "length" and len(parts) > 3
    assert last.choices == [] and last.usage is not None
    assert last.usage.prompt_tokens == answer.usage.prompt_tokens and last.usage.completion_tokens == 12


def test_the_prompt_is_the_templates(url: str, tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    answer = post(url, messages=messages, seed=1, reasoning_effort="none")
    # The fuller prompt below has the same length only if its parts are where the template has them.
    bare = post(url, seed=1, reasoning_effort="none")
    longer = len(tokenizer.encode("Be brief.")) - len(tokenizer.encode("You are a helpful assistant."))
    assert answer["usage"]["prompt_tokens"] - bare["usage"]["prompt_tokens"] == longer
    enabled = post(url, seed=1, reasoning_effort="high")
    assert enabled["choices"][0]["message"]["content"] is None, "the prompt has opened the reasoning"
    assert enabled["choices"][0]["message"]["reasoning_content"]
    assert enabled["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


def test_a_second_turn_hits_the_prefix_of_the_first(url: str) -> None:
    first = post(url, seed=1)
    said = first["choices"][0]["message"]
    second = post(url, messages=[*HELLO, said, {"role": "user", "content": "Again"}], seed=1)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 128 and cached % 128 == 0


def test_choices_and_log_probabilities(url: str) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as client:
            return await client.chat.completions.create(
                model=MODEL,
                messages=HELLO,
                n=2,
                seed=5,
                logprobs=True,
                top_logprobs=3,
                max_tokens=6,
                extra_body=DISABLED,
            )

    answer = asyncio.run(ask())
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    for choice in answer.choices:
        entries = choice.logprobs.content
        assert len(entries) == 6 and all(len(entry.top_logprobs) == 3 for entry in entries)
        text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
        assert not any(marker in text for marker in MARKERS) and text == choice.message.content
        for entry in entries:
            best = [top.logprob for top in entry.top_logprobs]
            assert best == sorted(best, reverse=True) and entry.logprob <= best[0] <= 0.0


def test_a_stop_string_ends_the_message(url: str) -> None:
    whole = post(url, seed=3, max_tokens=12, **DISABLED)["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:2]
    [choice] = post(url, seed=3, max_tokens=12, stop=stop, **DISABLED)["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_without_a_limit_the_context_is_the_limit(url: str) -> None:
    card = httpx.get(f"{url}/v1/models").json()["data"][0]
    prompt_tokens = post(url)["usage"]["prompt_tokens"]
    room = card["max_model_len"] - prompt_tokens
    error = post(url, 400, max_tokens=None, max_completion_tokens=room + 1)
    assert (error["param"], error["code"]) == ("max_completion_tokens", "context_length_exceeded")
    # A bias that leaves nothing but the end of the turn keeps this short.
    answer = post(url, max_tokens=None, stop_token_ids=[5], logit_bias={"5": 100})
    assert answer["choices"][0]["finish_reason"] == "stop"
    error = post(url, 400, messages=[{"role": "user", "content": "word " * card["max_model_len"]}])
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


# --- reasoning and tool calls ------------------------------------------------------------------------------------


def test_reasoning_and_parallel_calls(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": [WEATHER, CLOCK]}
    body = forced(tokenizer, f"{THINK}hm < so{THINK_END}I look.{CALLS}")
    answer = client.chat.completions.create(**asked, extra_body=body)
    [choice] = answer.choices
    message = choice.message
    assert (message.content, message.reasoning_content) == ("I look.", "hm < so")  # type: ignore[attr-defined]
    assert choice.finish_reason == "tool_calls"
    expected = [("weather", {"city": "Rome", "days": [True]}), ("clock", {})]
    assert message.tool_calls is not None
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == expected  # type: ignore[union-attr]
    assert len({call.id for call in message.tool_calls}) == 2
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(tokenizer.encode("hm < so"))

    reasoning, content, calls = "", "", []
    for chunk in client.chat.completions.create(**asked, stream=True, extra_body=body):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        calls += delta.tool_calls or []
    assert (reasoning, content, chunk.choices[0].finish_reason) == ("hm < so", "I look.", "tool_calls")
    assert [(call.index, call.type) for call in calls] == [(0, "function"), (1, "function")]
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == expected

    history = [*HELLO, message.model_dump(), *reversed([tool_result(call) for call in message.tool_calls])]
    again = client.chat.completions.create(**{**asked, "messages": history}, max_tokens=4)
    assert again.usage is not None and again.usage.prompt_tokens > answer.usage.prompt_tokens


def tool_result(call: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call.id, "content": f"result of {call.function.name}"}


def test_calls_that_were_not_asked_for(url: str, tokenizer: Tokenizer) -> None:
    clock = "@<invoke name=clock>@</invoke>"
    calls = f"@<tool_call>{clock}{clock}@</tool_call>"
    body = forced(tokenizer, calls)
    [choice] = post(url, **body)["choices"]
    assert choice["message"]["content"] == calls.replace("@", "") and choice["finish_reason"] == "stop"
    [choice] = post(url, **body, tools=[WEATHER, CLOCK], tool_choice="none")["choices"]
    assert "tool_calls" not in choice["message"]
    [choice] = post(url, **body, tools=[WEATHER, CLOCK], parallel_tool_calls=False)["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["clock"]


@pytest.mark.parametrize("thinking_mode", ["disabled", "enabled", "adaptive"])
def test_a_required_call_is_made_whatever_the_model(url: str, tokenizer: Tokenizer, thinking_mode: str) -> None:
    # A random model would think for ever: the bias ends it.
    bias = {str(tokenizer.token_id(THINK_END)): 100}
    asked: dict[str, Any] = {
        "tools": [WEATHER, CLOCK],
        "max_tokens": 300,
        "seed": 1,
        "logit_bias": bias,
        "chat_template_kwargs": {"thinking_mode": thinking_mode},
    }
    [choice] = post(url, **asked, tool_choice={"type": "function", "function": {"name": "weather"}})["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and not choice["message"]["content"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])


def test_required_and_its_refusals(url: str) -> None:
    [choice] = post(url, tools=[CLOCK], tool_choice="required", max_tokens=300, parallel_tool_calls=False, **DISABLED)[
        "choices"
    ]
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "clock", "arguments": "{}"}]
    for body in (
        {"tool_choice": "required"},
        {"tool_choice": "always", "tools": [CLOCK]},
        {"tool_choice": {"type": "custom"}, "tools": [CLOCK]},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [CLOCK]},
        {"tool_choice": "required", "tools": [CLOCK], "response_format": {"type": "json_object"}},
    ):
        assert post(url, 400, **body)["param"] == "tool_choice"


class Booking(pydantic.BaseModel):
    nights: typing.Annotated[int, pydantic.Field(ge=1, le=9)]
    note: typing.Annotated[str, pydantic.Field(max_length=5)] | None


def test_a_strict_tool_binds_a_call_that_the_model_chose_to_make(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        tools=[openai.pydantic_function_tool(Booking)],
        parallel_tool_calls=False,
        max_tokens=300,
        seed=1,
        logit_bias={str(tokenizer.token_id(NAMESPACE)): 100},
        extra_body=DISABLED,
    )
    assert answer.choices[0].message.tool_calls is not None
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Booking)


class Step(pydantic.BaseModel):
    done: bool
    kind: str | None


def test_a_response_format_binds_the_content_and_not_the_reasoning(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        response_format=Step,
        max_tokens=300,
        temperature=0,
        logit_bias={str(tokenizer.token_id(THINK_END)): 100, str(tokenizer.token_id(THINK)): 100, **quotes(tokenizer)},
        extra_body={"chat_template_kwargs": {"thinking_mode": "adaptive"}},
    )
    assert isinstance(answer.choices[0].message.parsed, Step)


def quotes(tokenizer: Tokenizer) -> dict[str, float]:
    """A bias that ends strings."""
    return {str(tokenizer.encode('"')[0]): 50}


# --- every field that OpenAI documents ---------------------------------------------------------------------------


def test_the_table_has_the_fields_of_the_installed_client() -> None:
    for route, parameters in (
        ("/v1/chat/completions", chat_parameters.CompletionCreateParamsStreaming),
        ("/v1/completions", completion_parameters.CompletionCreateParamsStreaming),
    ):
        assert set(openai_table.DOCUMENTED[route]) == typing.get_type_hints(parameters).keys()
        levels: dict[str, set[str]] = {}
        for field in openai_table.fields(route):
            levels.setdefault(field.level, set()).add(field.name)
        assert levels["honoured"] == CASES[route].keys() | BY_HAND
        assert levels["refused"] <= REFUSED.keys() and levels["tolerated"] <= TOLERATED.keys()


@pytest.mark.parametrize("route", openai_table.ROUTES)
def test_every_field_does_what_the_table_says(url: str, route: str) -> None:
    baselines: dict[str, Any] = {}

    def ask(status: int = 200, **fields: Any) -> dict[str, Any]:
        return post(url, status, route, **{**BASE[route], **fields})

    def baseline(beside: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(beside)
        if key not in baselines:
            baselines[key] = ask(**beside)
        known: dict[str, Any] = baselines[key]
        return known

    for field in openai_table.fields(route):
        name = field.name
        if field.level == "refused":
            error = ask(400, **{name: REFUSED[name]})
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        elif field.level == "tolerated":
            accepted, refused_value = TOLERATED[name]
            assert ask(**{name: accepted})["choices"] == baseline({})["choices"], name
            if refused_value is not None:
                error = ask(400, **{name: refused_value})
                assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        elif name not in BY_HAND:
            case = CASES[route][name]
            answer = ask(case.status, **{**case.beside, name: case.value})
            assert case.shows(answer, baseline(case.beside)), f"{name}={case.value!r}: {answer}"
    nothing = {field.name: None for field in openai_table.fields(route) if field.name not in BASE[route]}
    assert ask(**nothing)["choices"] == baseline({})["choices"], "null is not given"


@pytest.mark.parametrize("route", openai_table.ROUTES)
def test_stop_and_stream(url: str, route: str) -> None:
    stop = text(post(url, 200, route, **BASE[route]))[3:5]
    [choice] = post(url, 200, route, **BASE[route], stop=[stop])["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    body = {**BASE[route], "stream": True, "stream_options": {"include_usage": True}}
    response = httpx.post(f"{url}{route}", json=body, timeout=TIMEOUT_S)
    assert response.headers["content-type"].startswith("text/event-stream")
    *_, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == 8
