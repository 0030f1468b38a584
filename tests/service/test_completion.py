"""A choice made from engine events: text, tokens, log-probabilities and the reason it ended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenizer import Tokenizer
from engine.types import FinishReason, Logprobs, RequestEvent
from service.choice import MIN_LOGPROB, TokenizedPrompt, usage_of
from service.completion import TextChoice
from service.errors import GenerationFailed
from service.protocol import CompletionRequest

TEXT = "The naïve 😀 fox"


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_dir(checkpoint)


def make(tokenizer: Tokenizer, *, prompt_token_ids: list[int] | None = None, **fields: Any) -> TextChoice:
    request = CompletionRequest.parse(json.dumps({"prompt": "p", "max_tokens": 64, **fields}).encode())
    prompt = TokenizedPrompt(None, prompt_token_ids or tokenizer.encode("p"), tokenizer)
    return TextChoice(0, prompt, request, request.sampling())


def event(token_ids: list[int], **fields: Any) -> RequestEvent:
    return RequestEvent("r", 0, token_ids, **fields)


@settings(max_examples=40)
@given(st.data())
def test_text_does_not_depend_on_how_events_are_merged_or_taken(tokenizer: Tokenizer, data: Any) -> None:
    token_ids = tokenizer.encode(TEXT)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(token_ids) - 1))))
    choice = make(tokenizer, return_token_ids=True, logprobs=0)
    text, tokens, offsets = "", [], []
    for begin, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True):
        part = token_ids[begin:end]
        reason = FinishReason.LENGTH if end == len(token_ids) else None
        ended = choice.push(event(part, logprobs=[{t: -1.0} for t in part], finish_reason=reason))
        assert ended == (reason is not None)
        if data.draw(st.booleans()) or ended:
            news = choice.take()
            assert news is not None and news.logprobs is not None
            assert isinstance(news.token_ids, list)
            text += news.text
            tokens += news.token_ids
            offsets += news.logprobs.text_offset
    assert (text, tokens) == (TEXT, token_ids)
    assert len(offsets) == len(token_ids) and offsets == sorted(offsets)
    assert choice.take() is None or choice.finish_reason == "length"


def test_tokens_after_a_stop_string_in_the_same_event_are_dropped(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one two three")
    choice = make(tokenizer, stop="two", return_token_ids=True, logprobs=0)
    assert choice.push(event(token_ids, logprobs=[{t: -1.0} for t in token_ids])), "complete at once"
    news = choice.take()
    assert news is not None and news.logprobs is not None
    assert (news.text, news.finish_reason, news.stop_reason) == ("one ", "stop", "two")
    assert news.token_ids == token_ids[: choice.num_tokens]
    assert len(news.logprobs.tokens) == choice.num_tokens < len(token_ids)


def test_held_back_text_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    choice = make(tokenizer, stop="fox jumps")
    choice.push(event(tokenizer.encode("a fox")))
    first = choice.take()
    assert first is not None and "fox" not in first.text, "it may be the start of the stop string"
    choice.push(event([], finish_reason=FinishReason.LENGTH))
    last = choice.take()
    assert last is not None and first.text + last.text == "a fox"
    assert last.finish_reason == "length" and last.stop_reason is None


def test_nothing_to_tell_gives_no_chunk(tokenizer: Tokenizer) -> None:
    choice = make(tokenizer)
    first_byte = next(t for t in tokenizer.encode("😀") if tokenizer.token_text(t).startswith("bytes:"))
    choice.push(event([first_byte]))
    assert choice.take() is None, "half a character is not sent"


def test_an_engine_error_is_raised_with_its_reason(tokenizer: Tokenizer) -> None:
    choice = make(tokenizer)
    with pytest.raises(GenerationFailed, match="logits were not finite"):
        choice.push(event([], finish_reason=FinishReason.ERROR, error="logits were not finite"))


def test_logprobs_are_finite_json_and_show_the_actual_token(tokenizer: Tokenizer) -> None:
    entries: Logprobs = {30: -math.inf, 40: -0.5, 41: -0.75, 42: -2.0}
    choice = make(tokenizer, logprobs=2)
    choice.push(event([30], logprobs=[entries], finish_reason=FinishReason.LENGTH))
    news = choice.take()
    assert news is not None and news.logprobs is not None
    assert news.logprobs.token_logprobs == [MIN_LOGPROB]
    [top] = news.logprobs.top_logprobs
    names = [tokenizer.token_text(token) for token in (30, 40, 41)]
    assert top == dict(zip(names, (MIN_LOGPROB, -0.5, -0.75), strict=True))
    assert b"null" not in msgspec.json.encode(news.logprobs)


def test_prompt_logprobs_rank_only_what_was_asked_for(tokenizer: Tokenizer) -> None:
    prompt_logprobs: list[Logprobs | None] = [None, {9: -4.0, 5: -0.1, 6: -1.0, 7: -2.0}]
    choice = make(tokenizer, prompt_token_ids=[8, 9], prompt_logprobs=2, echo=True, logprobs=0, max_tokens=1)
    choice.push(
        event(
            [5],
            logprobs=[{5: -0.1}],
            prompt_logprobs=prompt_logprobs,
            finish_reason=FinishReason.LENGTH,
        )
    )
    news = choice.take()
    assert news is not None and isinstance(news.prompt_logprobs, list)
    first, second = news.prompt_logprobs
    assert first is None and second is not None
    assert {token: entry.rank for token, entry in second.items()} == {"9": None, "5": 1, "6": 2}


def test_usage_counts_a_prompt_once_for_all_its_choices(tokenizer: Tokenizer) -> None:
    prompts = [TokenizedPrompt(None, [1, 2, 3], tokenizer), TokenizedPrompt(None, [4], tokenizer)]
    choices = [make(tokenizer) for _ in range(4)]
    for i, choice in enumerate(choices):
        choice.push(event([40] * (i + 1), num_cached_tokens=128 * i))
    usage = usage_of(prompts, choices)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 10, 14)
    assert usage.prompt_tokens_details.cached_tokens == 256
