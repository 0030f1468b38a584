"""Request bodies without a service: every refusal names the field, what is wrong with it, and what was sent."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineDead, Overloaded, RequestError
from engine.types import SamplingParams
from service import errors, sse
from service.boundary import check_request_id, read_body
from service.limits import BodyBudget
from service.protocol import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    check_token_ids,
    parse_prompts,
)

MAX_CHOICES = 64


def accept(**fields: Any) -> CompletionRequest:
    request = CompletionRequest.parse(json.dumps({"prompt": "a", **fields}).encode())
    request.check(max_choices=MAX_CHOICES)
    return request


def refuse(body: bytes | dict[str, Any]) -> RequestError:
    """What the whole path from body to sampling parameters says."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        request = CompletionRequest.parse(raw)
        request.check(max_choices=MAX_CHOICES)
        request.sampling()
    assert errors.answer(caught.value).status == 400
    return caught.value


def test_defaults_are_the_engines_and_null_means_absent() -> None:
    nothing = {name: None for name in CompletionRequest.model_fields if name != "prompt"}
    assert accept(**nothing).sampling() == accept().sampling() == SamplingParams()


def test_every_sampling_field_reaches_the_engine() -> None:
    fields = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2,
        "logit_bias": {"5": -100, "6": 1.5},
        "seed": -3,
        "stop": ["x", "yy"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "min_tokens": 2,
        "logprobs": 3,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    expected = SamplingParams(**{**fields, "logit_bias": {5: -100.0, 6: 1.5}})
    assert accept(**fields).sampling() == expected
    assert set(fields) == set(SamplingParams.__dataclass_fields__) - {"guided"}, (
        "a sampling parameter is not in the API"
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompt_forms(prompt: Any, expected: Any) -> None:
    assert accept(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "string or a list"),
        (3, "string or a list"),
        ({"text": "a"}, "string or a list"),
        ("", "prompt 0 is empty"),
        ([], "empty list"),
        ([[]], "prompt 0 is empty"),
        (["a", ""], "prompt 1 is empty"),
        ([1, "a"], 'got "a" at 1'),
        ([1, 2.5], "got 2.5 at 1"),
        ([True], "got true at 0"),
        ([1, None], "got null at 1"),
        (["a", [1]], "at 1"),
        ([[1], "a"], "at 1"),
        ([[[1]]], "integer token ids"),
        ([None], "got null at 0"),
    ],
)
def test_bad_prompts(prompt: Any, says: str) -> None:
    error = refuse({"prompt": prompt})
    assert error.param == "prompt" and says in error.message


_INTEGERS = ("max_tokens", "n", "logprobs", "seed", "top_k", "min_tokens", "prompt_logprobs", "best_of")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_BOOLEANS = (
    "stream",
    "echo",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "add_special_tokens",
    "return_token_ids",
    "return_tokens_as_token_ids",
)
_OBJECTS = ("stream_options", "response_format", "structured_outputs")
_WRONG_TYPES: list[tuple[str, Any]] = (
    [(name, value) for name in _INTEGERS for value in ("3", 1.5, 3.0, True, [1], {})]
    + [(name, value) for name in _NUMBERS for value in ("0.5", True, [0.5], {})]
    + [(name, value) for name in _BOOLEANS for value in ("true", 1, 0.0, [])]
    + [(name, value) for name in ("model", "user") for value in (1, True, ["a"], {})]
    + [("stop", value) for value in (1, True, {}, [1], [["a"]], [None])]
    + [("stop_token_ids", value) for value in (1, "1", ["1"], [1.0], [True], {})]
    + [("logit_bias", value) for value in (1, "1", [1], {"a": 1}, {"1": "1"}, {"1": True}, {"-1": 1}, {"": 1})]
    + [(name, value) for name in _OBJECTS for value in (1, True, "a", [])]
    + [(name, value) for name in ("guided_regex", "guided_grammar") for value in (1, True, ["a"], {})]
    + [("guided_json", value) for value in (1, True, ["a"])]
    + [("guided_choice", value) for value in (1, True, "a", {})]
)


def test_every_field_is_tried_with_a_wrong_type() -> None:
    assert {name for name, _ in _WRONG_TYPES} | {"prompt"} == set(CompletionRequest.model_fields)


@pytest.mark.parametrize(("name", "value"), _WRONG_TYPES)
def test_wrong_types(name: str, value: Any) -> None:
    error = refuse({"prompt": "a", name: value})
    assert error.param == name and error.code == "invalid_type" and name in error.message


@pytest.mark.parametrize("name", _NUMBERS)
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_must_be_finite(name: str, literal: str) -> None:
    error = refuse(f'{{"prompt": "a", "{name}": {literal}}}'.encode())
    assert error.param == name and "finite" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**30),
        ("n", 0),
        ("n", -5),
        ("n", 10**9),
        ("n", MAX_CHOICES + 1),
        ("temperature", -0.1),
        ("temperature", 1e9),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 10**6),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("best_of", 2),
        ("suffix", "end"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 2**20),
        ("stop", ["x" * 2**16] * 16),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(129))),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("logit_bias", {"9" * 30: 1}),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    error = refuse({"prompt": "a", name: value})
    assert error.param == name and name in error.message
    assert len(errors.answer(error).json()) < 1500, "an answer must not grow with the request"


def test_choices_are_bounded_over_all_prompts() -> None:
    assert refuse({"prompt": ["a"] * 40, "n": 2}).param == "n"
    assert refuse({"prompt": ["a"] * 65}).param == "prompt"
    assert accept(prompt=["a"] * 32, n=2).num_choices_per_prompt == 2


def test_unknown_fields_are_refused_by_name() -> None:
    error = refuse({"prompt": "a", "tempereture": 1})
    assert error.param == "tempereture" and error.code == "unknown_parameter"
    assert "did you mean 'temperature'" in error.message
    assert refuse({"prompt": "a", "prompt_embeds": "AA=="}).code == "unsupported_parameter"
    nested = refuse({"prompt": "a", "stream": True, "stream_options": {"include_usages": True}})
    assert nested.param == "stream_options.include_usages" and nested.code == "unknown_parameter"
    typed = refuse({"prompt": "a", "stream": True, "stream_options": {"include_usage": "yes"}})
    assert typed.param == "stream_options.include_usage"
    assert len(refuse({"prompt": "a", "x" * 10**6: 1}).message) < 300


def test_stream_rules() -> None:
    assert refuse({"prompt": "a", "stream": True, "prompt_logprobs": 1}).param == "prompt_logprobs"
    assert refuse({"prompt": "a", "stream": False, "stream_options": {}}).param == "stream_options"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"prompt": "a",}', "invalid_json"),
        (b'{"prompt": "a"} x', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        (b"\x00\x80", "invalid_utf8"),
        (b'{"prompt": "\xc3"}', "invalid_utf8"),
        (b"[]", "invalid_type"),
        (b"3", "invalid_type"),
        (b"null", "invalid_type"),
        (b"{}", "missing_required_parameter"),
    ],
)
def test_bodies_that_are_no_request(body: bytes, code: str) -> None:
    assert refuse(body).code == code


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt":"a","stop_token_ids":[' + b'"",' * 100_000 + b"1]}", "stop_token_ids"),
        (b'{"prompt":"a","stop":[' + b"1," * 100_000 + b"1]}", "stop"),
        (b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}}", "logit_bias"),
        (b'{"prompt":"a",' + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}", None),
        (b'{"prompt":[' + b"[1]," * 40_000 + b"[1]]}", "prompt"),
        (b'{"prompt":[' + b"1," * 100_000 + b'""]}', "prompt"),
        (b'{"prompt":"a","temperature":[' + b"[1]," * 40_000 + b"1]}", "temperature"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_large_bad_body_costs_memory_for_itself_alone(body: bytes, param: str | None) -> None:
    tracemalloc.start()
    try:
        error = refuse(body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.param == param and len(error.message) < 300
    # An error for each entry takes several hundred bytes per byte of the body.
    assert peak_bytes < 64 * len(body)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_cleanly(body: bytes) -> None:
    refuse(body)


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(CompletionRequest.model_fields)), _json_values)
def test_any_value_of_any_field_is_taken_or_refused_under_its_name(name: str, value: Any) -> None:
    body = {"prompt": "a", name: value}
    try:
        raw = json.dumps(body).encode()
        request = CompletionRequest.parse(raw)
        request.check(max_choices=MAX_CHOICES)
        request.sampling()
    except RequestError as error:
        param = error.param
        assert param is not None and (param == name or param.startswith(f"{name}."))


def test_max_tokens_zero_only_with_echo() -> None:
    request = accept(max_tokens=0, echo=True, logprobs=2)
    assert request.generates_nothing
    assert request.sampling().max_tokens == 1 and request.sampling().prompt_logprobs == 2
    assert not accept(max_tokens=1, echo=True).generates_nothing


def test_echo_asks_for_as_many_prompt_logprobs_as_either_field_needs() -> None:
    assert accept(echo=True, logprobs=2, prompt_logprobs=5).sampling().prompt_logprobs == 5
    assert accept(echo=True, logprobs=5, prompt_logprobs=2).sampling().prompt_logprobs == 5
    assert accept(logprobs=5).sampling().prompt_logprobs is None


def test_token_ids_in_vocabulary() -> None:
    check_token_ids([0, 99], 100, "prompt")
    for ids in ([100], [-1], [5, 10**30]):
        with pytest.raises(RequestError) as caught:
            check_token_ids(ids, 100, "prompt")
        assert caught.value.param == "prompt" and "99" in caught.value.message
    assert parse_prompts([10**30]) == [[10**30]]


def test_tokenize_bodies() -> None:
    assert TokenizeRequest.parse(b'{"prompt": "a"}').prompt == "a"
    assert DetokenizeRequest.parse(b'{"tokens": [1, 2]}').tokens == [1, 2]
    for model, body, param in (
        (TokenizeRequest, b'{"prompt": 1}', "prompt"),
        (TokenizeRequest, b'{"prompt": "a", "messages": []}', "messages"),
        (DetokenizeRequest, b'{"tokens": [true]}', "tokens"),
        (DetokenizeRequest, b'{"tokens": "a"}', "tokens"),
    ):
        with pytest.raises(RequestError) as caught:
            model.parse(body)
        assert caught.value.param == param


def test_error_table() -> None:
    overloaded = errors.answer(Overloaded("full", retry_after_s=2.3))
    assert (overloaded.status, overloaded.headers) == (429, (("retry-after", "3"),))
    assert errors.answer(EngineDead("gone")).status == 503
    assert errors.answer(errors.NotFound("no", param="model", code="model_not_found")).status == 404
    assert errors.answer(errors.BodyTooLarge("big", code="request_too_large")).status == 413
    context = errors.answer(RequestError("too long", param="prompt", code="context_length_exceeded"))
    assert context.status == 400
    assert json.loads(context.json()) == {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "context_length_exceeded",
        }
    }


def test_unexpected_errors_tell_nothing() -> None:
    secret = errors.answer(KeyError("/etc/secret"))
    assert secret.status == 500 and b"secret" not in secret.json()
    assert not errors.is_expected(KeyError()) and errors.is_expected(EngineDead("gone"))


def test_request_ids_are_short_and_printable() -> None:
    check_request_id("abc-1")
    for bad in ("x" * 129, "a\tb", "ä"):
        with pytest.raises(RequestError, match="x-request-id"):
            check_request_id(bad)


async def _stalls() -> dict[str, Any]:
    await asyncio.sleep(60.0)
    raise AssertionError("the deadline came first")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [(b"application/json", 408), (b"text/plain", 400), (b"application/jsonx", 400), (b"", 400)],
)
def test_bodies_that_do_not_come(content_type: bytes, status: int) -> None:
    scope = {"type": "http", "headers": [(b"content-type", content_type)]}
    with pytest.raises(RequestError) as caught:
        asyncio.run(read_body(scope, _stalls, max_bytes=100, budget=BodyBudget(1000), timeout_s=0.05))
    assert errors.answer(caught.value).status == status


@pytest.mark.parametrize("sizes", [[100], [60, 40], [0, 100], [101], [60, 41], [1] * 101])
def test_bodies_are_read_up_to_the_limit(sizes: list[int]) -> None:
    messages = [{"type": "http.request", "body": b"x" * n, "more_body": True} for n in sizes]
    messages[-1]["more_body"] = False
    queue = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(queue)

    scope = {"type": "http", "headers": [(b"content-type", b"application/vnd.x+json; charset=utf-8")]}
    budget = BodyBudget(150)
    if sum(sizes) <= 100:
        assert asyncio.run(read_body(scope, receive, max_bytes=100, budget=budget)) == b"x" * sum(sizes)
    else:
        with pytest.raises(errors.BodyTooLarge):
            asyncio.run(read_body(scope, receive, max_bytes=100, budget=budget))
    assert budget.used == 0, "what a body took is free again"


def test_events_are_single_lines() -> None:
    framed = sse.event({"text": "a\nb\r\n\u2028"})
    assert framed.startswith(b"data: ") and framed.endswith(b"\n\n")
    assert framed.count(b"\n") == 2 and b"\r" not in framed
    assert json.loads(framed[6:]) == {"text": "a\nb\r\n\u2028"}
