"""What /v1/chat/completions makes of a choice: a message, whole or in deltas."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from engine.tokenizer import Tokenizer
from engine.types import FinishReason, Logprobs, SamplingParams
from service.chat_protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    ChatTokenLogprob,
    FunctionCall,
    MessageDelta,
    ToolCallDelta,
    ToolCallEntry,
    TopLogprob,
)
from service.choice import Choice, TokenizedPrompt, actual_and_best, finite
from service.parsers.markers import NAMESPACE, THINK, THINK_END
from service.parsers.message import MessageParser, News
from service.parsers.tools import ToolCall

TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class MarkerIds:
    """The tokens of a vocabulary that stand for markers; None where it has no such token."""

    think: int | None
    think_end: int | None
    namespace: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> MarkerIds:
        return cls(*map(tokenizer.token_id, (THINK, THINK_END, NAMESPACE)))


class MessageChoice(Choice):
    """A choice of a chat completion. Its text is read by a parser as it comes."""

    def __init__(
        self,
        index: int,
        prompt: TokenizedPrompt,
        request: ChatRequest,
        sampling: SamplingParams,
        *,
        in_reasoning: bool,
        markers: MarkerIds,
    ) -> None:
        """in_reasoning: whether the prompt has opened the model's reasoning."""
        super().__init__(index, prompt, request, sampling)
        self.num_reasoning_tokens = 0
        self._num_best = request.top_logprobs or 0
        self._markers = markers
        self._reasons = in_reasoning
        self._parser = MessageParser(
            in_reasoning=in_reasoning, tools=request.schemas or None, max_calls=request.max_calls
        )
        self._has_role = False
        self._num_calls = 0
        self._logprobs: list[ChatTokenLogprob] = []

    def take(self) -> ChatChunkChoice | None:
        news = self._parser.news()
        if not (news or self._logprobs or self._token_ids or self.finish_reason):
            return None
        delta = MessageDelta(role=UNSET if self._has_role else "assistant")
        self._has_role = True
        if news.content:
            delta.content = news.content
        if news.reasoning:
            delta.reasoning_content = news.reasoning
        if news.calls:
            delta.tool_calls = [
                ToolCallDelta(i, _new_call_id(), FunctionCall(call.name, call.arguments))
                for i, call in enumerate(news.calls, start=self._num_calls)
            ]
            self._num_calls += len(news.calls)
        return ChatChunkChoice(
            index=self.index,
            delta=delta,
            logprobs=self._take_logprobs(),
            finish_reason=self._reason(self._num_calls),
            stop_reason=self.stop_reason,
            token_ids=self._take_token_ids(),
        )

    def whole(self) -> ChatChoice:
        news = self._parser.news()
        return ChatChoice(
            index=self.index,
            message=_message(news),
            logprobs=self._take_logprobs(),
            finish_reason=self._reason(len(news.calls)),
            stop_reason=self.stop_reason,
            token_ids=self._take_token_ids(),
        )

    def _reason(self, num_calls: int) -> str | None:
        """A message that ended by itself ended for its calls, if it has any."""
        return TOOL_CALLS if num_calls and self.finish_reason == FinishReason.STOP else self.finish_reason

    def _take_logprobs(self) -> ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        entries, self._logprobs = self._logprobs, []
        return ChatLogprobs(entries)

    def _take_token_ids(self) -> list[int] | UnsetType:
        if not self._returns_token_ids:
            return UNSET
        token_ids, self._token_ids = self._token_ids, []
        return token_ids

    def _add_tokens(self, token_ids: Sequence[int], text: str) -> None:
        self._count_reasoning(token_ids)
        self._parser.push(text)
        if self.finish_reason is not None:
            self._parser.finish()

    def _count_reasoning(self, token_ids: Sequence[int]) -> None:
        """Tokens between the markers: what the text cannot say, where several tokens arrive as one piece."""
        assert self.num_reasoning_tokens is not None
        markers = self._markers
        for token_id in token_ids:
            if token_id == markers.think:
                self._reasons = True
            elif token_id == markers.think_end:
                self._reasons = False
            elif self._reasons:
                self.num_reasoning_tokens += 1

    def _add_logprobs(self, token_id: int, entries: Logprobs, offset: int) -> None:
        top = [self._top(other, logprob) for other, logprob in actual_and_best(entries, self._num_best)]
        actual = top[0]
        ranked = sorted(top, key=lambda entry: -entry.logprob)[: self._num_best]
        self._logprobs.append(ChatTokenLogprob(actual.token, actual.logprob, actual.bytes, ranked))

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        data = self._prompt.tokenizer.token_bytes(token_id)
        return TopLogprob(self._token_text(token_id), finite(logprob), list(data))


def _message(news: News) -> AssistantMessage:
    message = AssistantMessage(content=news.content or (None if news.reasoning or news.calls else ""))
    if news.reasoning:
        message.reasoning_content = news.reasoning
    if news.calls:
        message.tool_calls = [_entry(call) for call in news.calls]
    return message


def _entry(call: ToolCall) -> ToolCallEntry:
    return ToolCallEntry(_new_call_id(), FunctionCall(call.name, call.arguments))


def _new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
