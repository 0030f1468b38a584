"""One choice of an answer while the engine makes it: its text, tokens and log-probabilities as they come.

A choice is one engine request: index = prompt index * n + i. Its text is what the detokenizer lets go; a stop
string ends it here and the engine hears of that as an abort. What a choice looks like in an answer is the matter of
the route: service/completion.py, service/chat_completion.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
from msgspec import UNSET, UnsetType

from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.types import FinishReason, Logprobs, RequestEvent, SamplingParams
from service.errors import GenerationFailed
from service.protocol import CompletionTokensDetails, GenerationRequest, PromptTokensDetails, Usage

# JSON has no -inf; vLLM and OpenAI's clients know this value as "impossible".
MIN_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt of a request. text: as the client wrote it, None when it sent token ids."""

    text: str | None
    token_ids: list[int]
    tokenizer: Tokenizer

    @cached_property
    def echo(self) -> tuple[str, list[int]]:
        """What `echo` gives back, and where each token's text begins in it. Special tokens are shown."""
        detokenizer = IncrementalDetokenizer(self.tokenizer, SamplingParams(skip_special_tokens=False))
        decoded = detokenizer.push(self.token_ids) + detokenizer.finish()
        return (decoded if self.text is None else self.text), detokenizer.offsets


class Choice(ABC):
    """Collects one request's events; `take` gives what is new since the last `take`.

    finish_reason: None while it runs.  stop_reason: the stop string or stop token id that ended it.  num_tokens: in
    its text so far.  num_reasoning_tokens: of those, None where the route has no reasoning.
    """

    num_reasoning_tokens: int | None = None

    def __init__(
        self, index: int, prompt: TokenizedPrompt, request: GenerationRequest, sampling: SamplingParams
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._prompt = prompt
        self._returns_token_ids = bool(request.return_token_ids)
        self._names_tokens_by_id = bool(request.return_tokens_as_token_ids)
        self._wants_logprobs = sampling.logprobs is not None
        self._stop_token_ids = sampling.stop_token_ids or ()
        self._detokenizer = IncrementalDetokenizer(prompt.tokenizer, sampling)
        self._started = False
        self._token_ids: list[int] = []

    def push(self, event: RequestEvent) -> bool:
        """Take the next event; True when the choice is complete with it.

        Raises GenerationFailed when the engine gave the request up.
        """
        if event.finish_reason is FinishReason.ERROR:
            raise GenerationFailed(event.error or "the engine could not go on with this request")
        if not self._started:
            self._started = True
            self.num_cached_tokens = event.num_cached_tokens
            self._begin(event)
        return self._extend(event)

    def _extend(self, event: RequestEvent) -> bool:
        """The event's tokens; what `push` returns."""
        detokenizer = self._detokenizer
        num_before = detokenizer.num_tokens_used
        text = detokenizer.push(event.token_ids, last_is_stop=event.stop_token_id is not None)
        finish_reason = event.finish_reason
        if finish_reason is not None:
            text += detokenizer.finish()
            if event.stop_token_id in self._stop_token_ids:
                self.stop_reason = event.stop_token_id
        if detokenizer.stopped is not None:
            finish_reason = FinishReason.STOP
            self.stop_reason = detokenizer.stopped
        self.num_tokens = detokenizer.num_tokens_used
        num_new = self.num_tokens - num_before
        if self._returns_token_ids:
            self._token_ids += event.token_ids[:num_new]
        if self._wants_logprobs and num_new:
            assert event.logprobs is not None, "the engine left out the log-probabilities asked for"
            offsets = detokenizer.offsets[num_before:]
            for entries, offset in zip(event.logprobs[:num_new], offsets, strict=True):
                self._add_logprobs(next(iter(entries)), entries, offset)
        if finish_reason is not None:
            self.finish_reason = finish_reason.value
        self._add_tokens(event.token_ids[:num_new], text)
        return self.finish_reason is not None

    @abstractmethod
    def take(self) -> msgspec.Struct | None:
        """What is new, as a chunk shows it; None while there is nothing to tell."""

    @abstractmethod
    def whole(self) -> msgspec.Struct:
        """The complete choice, in place of `take`."""

    def _begin(self, event: RequestEvent) -> None:
        """The first event is there."""
        return

    @abstractmethod
    def _add_tokens(self, token_ids: Sequence[int], text: str) -> None:
        """New tokens, and the text that became safe with them. After the last ones, `finish_reason` is set."""

    @abstractmethod
    def _add_logprobs(self, token_id: int, entries: Logprobs, offset: int) -> None:
        """One generated token. offset: characters of the choice's own text before it."""

    def _token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._names_tokens_by_id else self._prompt.tokenizer.token_text(token_id)


def ranked(entries: Logprobs) -> list[int]:
    """Token ids, the likeliest first."""
    return sorted(entries, key=lambda token_id: -entries[token_id])


def actual_and_best(entries: Logprobs, num_best: int) -> list[tuple[int, float]]:
    """The actual token, then the `num_best` best: the engine may have been asked for more than that."""
    actual = next(iter(entries))
    kept = [token_id for token_id in ranked(entries)[:num_best] if token_id != actual]
    return [(token_id, entries[token_id]) for token_id in (actual, *kept)]


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, MIN_LOGPROB)


def usage_of(prompts: Sequence[TokenizedPrompt], choices: Sequence[Choice]) -> Usage:
    """Tokens so far. A prompt counts once for all its choices, with the first one's prefix hit."""
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    num_output_tokens = sum(choice.num_tokens for choice in choices)
    num_per_prompt = len(choices) // len(prompts)
    num_cached_tokens = sum(choice.num_cached_tokens for choice in choices[::num_per_prompt])
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
        completion_tokens_details=_details(choice.num_reasoning_tokens for choice in choices),
    )


def _details(nums_reasoning_tokens: Iterable[int | None]) -> CompletionTokensDetails | UnsetType:
    counted = [num for num in nums_reasoning_tokens if num is not None]
    return CompletionTokensDetails(reasoning_tokens=sum(counted)) if counted else UNSET


def chunk_usage(
    request: GenerationRequest, prompts: Sequence[TokenizedPrompt], choices: Sequence[Choice]
) -> Usage | UnsetType | None:
    """The `usage` of a chunk that is not the last: null when a usage chunk will follow, as OpenAI does."""
    options = request.stream_options
    if options is None:
        return UNSET
    if options.continuous_usage_stats:
        return usage_of(prompts, choices)
    return None if options.include_usage else UNSET
