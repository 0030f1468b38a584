"""A chat choice made from engine events: the message, its tokens and log-probabilities, however events arrive."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenizer import Tokenizer
from engine.types import FinishReason, RequestEvent
from service.chat_completion import MarkerIds, MessageChoice
from service.chat_protocol import ChatRequest
from service.choice import TokenizedPrompt
from service.parsers.markers import NAMESPACE as NS
from service.parsers.markers import THINK, THINK_END

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
CALL = f'{NS}<tool_call>\n{NS}<invoke name="f">{NS}<x>5{NS}</x>{NS}</invoke>\n{NS}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_dir(checkpoint)


def make(tokenizer: Tokenizer, *, in_reasoning: bool = False, **fields: Any) -> MessageChoice:
    body = {"messages": [{"role": "user", "content": "p"}], "tools": TOOLS, **fields}
    request = ChatRequest.parse(json.dumps(body).encode())
    prompt = TokenizedPrompt("p", [1], tokenizer)
    markers = MarkerIds.of(tokenizer)
    return MessageChoice(0, prompt, request, request.sampling(512, None), in_reasoning=in_reasoning, markers=markers)


def event(token_ids: list[int], reason: FinishReason | None = None) -> RequestEvent:
    logprobs = [{token_id: -1.0, 5: -0.5} for token_id in token_ids]
    return RequestEvent("r", 0, token_ids, finish_reason=reason, logprobs=logprobs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_deltas_join_to_the_whole_message(tokenizer: Tokenizer, data: Any) -> None:
    parts = ["naïve ", "😀", THINK, THINK_END, CALL, "\n", NS]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=8)))
    token_ids = tokenizer.encode(text)
    in_reasoning, reason = (
        data.draw(st.booleans()),
        data.draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])),
    )
    asked: dict[str, Any] = {"in_reasoning": in_reasoning, "logprobs": True, "return_token_ids": True}
    expected = make(tokenizer, **asked)
    assert expected.push(event(token_ids, reason))
    whole = expected.whole()
    reasoning, content, calls, tokens, entries, roles = "", "", [], [], 0, []
    streamed = make(tokenizer, **asked)
    ends = sorted(data.draw(st.sets(st.integers(1, len(token_ids)))) | {len(token_ids)})
    for begin, end in pairwise([0, *ends]):
        streamed.push(event(token_ids[begin:end], reason if end == len(token_ids) else None))
        if (news := streamed.take()) is None:
            continue
        delta = news.delta
        roles.append(delta.role)
        reasoning += delta.reasoning_content if isinstance(delta.reasoning_content, str) else ""
        content += delta.content if isinstance(delta.content, str) else ""
        calls += delta.tool_calls if isinstance(delta.tool_calls, list) else []
        tokens += news.token_ids if isinstance(news.token_ids, list) else []
        entries += len(news.logprobs.content) if news.logprobs is not None else 0
    message = whole.message
    assert reasoning == (message.reasoning_content if isinstance(message.reasoning_content, str) else "")
    assert content == (message.content or "")
    made = message.tool_calls if isinstance(message.tool_calls, list) else []
    assert [call.function for call in calls] == [call.function for call in made]
    assert [call.index for call in calls] == list(range(len(made)))
    assert tokens == token_ids == whole.token_ids and entries == len(token_ids)
    assert roles[0] == "assistant" and "assistant" not in roles[1:]
    assert streamed.finish_reason == expected.finish_reason == reason.value
    assert news is not None and news.finish_reason == whole.finish_reason
    assert whole.finish_reason == ("tool_calls" if made and reason is FinishReason.STOP else reason.value)
    assert streamed.num_reasoning_tokens == expected.num_reasoning_tokens


def test_reasoning_tokens_are_those_between_the_markers(tokenizer: Tokenizer) -> None:
    inside = tokenizer.encode("some thought")
    for in_reasoning, text in ((False, f"{THINK}some thought{THINK_END}rest"), (True, f"some thought{THINK_END}rest")):
        choice = make(tokenizer, in_reasoning=in_reasoning)
        choice.push(event(tokenizer.encode(text), FinishReason.STOP))
        assert choice.num_reasoning_tokens == len(inside)


def test_a_stop_string_cuts_reasoning_and_calls_too(tokenizer: Tokenizer) -> None:
    choice = make(tokenizer, in_reasoning=True, stop=["thought"])
    assert choice.push(event(tokenizer.encode(f"some thought{THINK_END}rest")))
    whole = choice.whole()
    assert (whole.message.reasoning_content, whole.message.content) == ("some ", None)
    assert (whole.finish_reason, whole.stop_reason) == ("stop", "thought")
    choice = make(tokenizer, stop=["</x>"])
    assert choice.push(event(tokenizer.encode(f"Look:{CALL}")))
    assert choice.whole().message.content == "Look:" and choice.finish_reason == "stop", "half a call is none"


def test_an_empty_answer_is_an_empty_text(tokenizer: Tokenizer) -> None:
    choice = make(tokenizer)
    choice.push(event([], FinishReason.STOP))
    assert choice.whole().message.content == ""
