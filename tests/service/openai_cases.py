"""One request for every field that OpenAI documents, and how its answer shows that the field does what the table says.

The baseline of a route is its request with `BASE` alone. The served model is random; the same seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Answer = dict[str, Any]

BASE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "seed": 1,
        "return_token_ids": True,
        "chat_template_kwargs": {"thinking_mode": "disabled"},
    },
    "/v1/completions": {"prompt": "Hello", "max_tokens": 8, "seed": 1, "return_token_ids": True},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True)
class Case:
    """value: of the field.  shows(answer, baseline): whether the answer has the field's effect.  beside: other fields,
    which the baseline gets too.  status: of the answer, which for an error is its error object."""

    value: Any
    shows: Callable[[Answer, Answer], bool]
    beside: dict[str, Any] = field(default_factory=dict)
    status: int = 200


def tokens(answer: Answer, choice: int = 0) -> list[int]:
    token_ids: list[int] = answer["choices"][choice]["token_ids"]
    return token_ids


def text(answer: Answer) -> str:
    choice = answer["choices"][0]
    found: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return found


# So few likely tokens that they come again, where a penalty is felt.
_FEW = {"logit_bias": {str(token_id): 30 for token_id in range(300, 304)}}
_CALL = {"tools": [CLOCK], "max_tokens": 120}

_BOTH: dict[str, Case] = {
    "model": Case("other", lambda answer, _: answer["code"] == "model_not_found", status=404),
    "frequency_penalty": Case(2.0, lambda answer, base: tokens(answer) != tokens(base), _FEW),
    "presence_penalty": Case(2.0, lambda answer, base: tokens(answer) != tokens(base), _FEW),
    "logit_bias": Case({"300": 100}, lambda answer, base: {300} == set(tokens(answer)) != set(tokens(base))),
    "max_tokens": Case(3, lambda answer, base: tokens(answer) == tokens(base)[:3]),
    "n": Case(2, lambda answer, base: tokens(answer) == tokens(base) != tokens(answer, 1)),
    "seed": Case(2, lambda answer, base: tokens(answer) != tokens(base)),
    "temperature": Case(0.0, lambda answer, base: tokens(answer) == tokens(base), {"top_p": 1e-9}),
    "top_p": Case(1e-9, lambda answer, base: tokens(answer) != tokens(base)),
}

CASES: dict[str, dict[str, Case]] = {
    "/v1/completions": {
        **_BOTH,
        "prompt": Case("Good bye", lambda answer, base: tokens(answer) != tokens(base)),
        "echo": Case(True, lambda answer, base: text(answer) == "Hello" + text(base)),
        "logprobs": Case(2, lambda answer, _: len(answer["choices"][0]["logprobs"]["top_logprobs"]) == 8),
    },
    "/v1/chat/completions": {
        **_BOTH,
        "messages": Case(
            [{"role": "user", "content": "Good bye"}], lambda answer, base: tokens(answer) != tokens(base)
        ),
        "logprobs": Case(True, lambda answer, _: len(answer["choices"][0]["logprobs"]["content"]) == 8),
        "top_logprobs": Case(
            2,
            lambda answer, _: len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2,
            {"logprobs": True},
        ),
        "max_completion_tokens": Case(
            3, lambda answer, base: tokens(answer) == tokens(base)[:3], {"max_tokens": None, "max_completion_tokens": 8}
        ),
        "parallel_tool_calls": Case(
            False,
            lambda answer, _: len(answer["choices"][0]["message"]["tool_calls"]) == 1,
            {**_CALL, "tool_choice": "required"},
        ),
        "reasoning_effort": Case(
            "high",
            lambda answer, _: bool(answer["choices"][0]["message"]["reasoning_content"]),
            {"chat_template_kwargs": None},
        ),
        "response_format": Case(
            {"type": "json_object"}, lambda answer, base: text(answer).lstrip()[0] == "{" != text(base).lstrip()[:1]
        ),
        "tool_choice": Case(
            {"type": "function", "function": {"name": "clock"}},
            lambda answer, _: answer["choices"][0]["finish_reason"] == "tool_calls",
            _CALL,
        ),
        "tools": Case(
            [CLOCK], lambda answer, base: answer["usage"]["prompt_tokens"] > base["usage"]["prompt_tokens"] + 50
        ),
    },
}
# Asked for by hand in the test: their effect is another form of answer, or is made from the baseline's text.
BY_HAND = frozenset({"stop", "stream", "stream_options"})

# Values as OpenAI's reference has them.
REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "mp3"},
    "function_call": "auto",
    "functions": [{"name": "clock"}],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "Hello"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "suffix": "end",
    "verbosity": "low",
    "web_search_options": {},
}
# (accepted, refused) values; None: no value is refused for what it asks.
TOLERATED: dict[str, tuple[Any, Any]] = {
    "best_of": (1, 2),
    "metadata": ({"run": "1"}, None),
    "modalities": (["text"], ["text", "audio"]),
    "prompt_cache_key": ("group", None),
    "safety_identifier": ("hash", None),
    "service_tier": ("auto", "priority"),
    "store": (False, True),
    "user": ("someone", None),
}
