"""From engine events to the choices of a completion, whole or in chunks.

A choice is one engine request: index = prompt index * n + i. Its text is what the detokenizer lets go; a stop
string ends it here and the engine hears of that as an abort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from msgspec import UNSET, UnsetType

from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.types import FinishReason, Logprobs, RequestEvent, SamplingParams
from service.errors import GenerationFailed
from service.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    PromptTokensDetails,
    TokenLogprob,
    Usage,
)

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


class Choice:
    """Collects one request's events; `take` gives what is new since the last `take`."""

    def __init__(
        self, index: int, prompt: TokenizedPrompt, request: CompletionRequest, sampling: SamplingParams
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._prompt = prompt
        self._request = request
        self._stop_token_ids = sampling.stop_token_ids or ()
        self._detokenizer = IncrementalDetokenizer(prompt.tokenizer, sampling)
        self._offset = len(prompt.echo[0]) if request.echo else 0
        self._started = False
        self._stop_reason: str | int | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs = CompletionLogprobs()
        self._prompt_logprobs: list[Logprobs | None] | None = None
        self._prompt_is_new = False

    def push(self, event: RequestEvent) -> bool:
        """Take the next event; True when the choice is complete with it.

        Raises GenerationFailed when the engine gave the request up.
        """
        if event.finish_reason is FinishReason.ERROR:
            raise GenerationFailed(event.error or "the engine could not go on with this request")
        if not self._started:
            self._begin(event)
        if self._request.generates_nothing:
            self.finish_reason = event.finish_reason and event.finish_reason.value
            return event.finish_reason is not None
        detokenizer = self._detokenizer
        num_before = detokenizer.num_tokens_used
        self._text.append(detokenizer.push(event.token_ids, last_is_stop=event.stop_token_id is not None))
        if event.finish_reason is not None:
            self._text.append(detokenizer.finish())
            self.finish_reason = event.finish_reason.value
            if event.stop_token_id in self._stop_token_ids:
                self._stop_reason = event.stop_token_id
        if detokenizer.stopped is not None:
            self.finish_reason = FinishReason.STOP.value
            self._stop_reason = detokenizer.stopped
        self.num_tokens = detokenizer.num_tokens_used
        num_new = self.num_tokens - num_before
        if self._request.return_token_ids:
            self._token_ids += event.token_ids[:num_new]
        if self._request.logprobs is not None and num_new:
            assert event.logprobs is not None, "the engine left out the log-probabilities asked for"
            offsets = (self._offset + offset for offset in detokenizer.offsets[num_before:])
            for entries, offset in zip(event.logprobs[:num_new], offsets, strict=True):
                self._add_logprobs(next(iter(entries)), entries, offset)
        return self.finish_reason is not None

    def take(self) -> CompletionChoice | None:
        """What is new; None while there is nothing to tell."""
        text = "".join(self._text)
        has_logprobs = bool(self._logprobs.tokens)
        if not (text or has_logprobs or self._token_ids or self._prompt_is_new or self.finish_reason):
            return None
        choice = CompletionChoice(
            index=self.index,
            text=text,
            logprobs=self._logprobs if self._request.logprobs is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )
        if self._request.return_token_ids:
            choice.token_ids = self._token_ids
            if self._prompt_is_new:
                choice.prompt_token_ids = self._prompt.token_ids
        if self._prompt_is_new and self._request.prompt_logprobs is not None:
            choice.prompt_logprobs = self._prompt_logprobs_answer(self._request.prompt_logprobs)
        self._text, self._token_ids, self._prompt_is_new = [], [], False
        self._logprobs = CompletionLogprobs()
        return choice

    def _begin(self, event: RequestEvent) -> None:
        self._started = True
        self.num_cached_tokens = event.num_cached_tokens
        self._prompt_logprobs = event.prompt_logprobs
        request = self._request
        self._prompt_is_new = bool(request.return_token_ids) or request.prompt_logprobs is not None
        if not request.echo:
            return
        text, offsets = self._prompt.echo
        self._text.append(text)
        if request.logprobs is not None:
            assert event.prompt_logprobs is not None, "the engine left out the prompt's log-probabilities"
            positions = zip(self._prompt.token_ids, event.prompt_logprobs, offsets, strict=True)
            for token_id, entries, offset in positions:
                self._add_logprobs(token_id, entries, offset)

    def _add_logprobs(self, token_id: int, entries: Logprobs | None, offset: int) -> None:
        """One position; entries is None at the prompt's first token, which nothing predicts."""
        out = self._logprobs
        out.tokens.append(self._token_text(token_id))
        out.text_offset.append(offset)
        if entries is None:
            out.token_logprobs.append(None)
            out.top_logprobs.append(None)
            return
        assert self._request.logprobs is not None
        out.token_logprobs.append(_finite(entries[token_id]))
        best: dict[str, float] = {}
        for other, logprob in _actual_and_best(entries, self._request.logprobs):
            # Two ids may have the same text: the better one stays.
            best.setdefault(self._token_text(other), _finite(logprob))
        out.top_logprobs.append(best)

    def _token_text(self, token_id: int) -> str:
        if self._request.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self._prompt.tokenizer.token_text(token_id)

    def _prompt_logprobs_answer(self, num_best: int) -> list[dict[str, TokenLogprob] | None]:
        assert self._prompt_logprobs is not None, "the engine left out the prompt's log-probabilities"
        answer: list[dict[str, TokenLogprob] | None] = []
        for entries in self._prompt_logprobs:
            if entries is None:
                answer.append(None)
                continue
            ranks = {token_id: rank for rank, token_id in enumerate(_ranked(entries)[:num_best], start=1)}
            answer.append(
                {
                    str(token_id): TokenLogprob(
                        _finite(logprob), ranks.get(token_id), self._prompt.tokenizer.token_text(token_id)
                    )
                    for token_id, logprob in _actual_and_best(entries, num_best)
                }
            )
        return answer


def _ranked(entries: Logprobs) -> list[int]:
    return sorted(entries, key=lambda token_id: -entries[token_id])


def _actual_and_best(entries: Logprobs, num_best: int) -> list[tuple[int, float]]:
    """The actual token, then the `num_best` best: the engine may have been asked for more than that."""
    actual = next(iter(entries))
    kept = [token_id for token_id in _ranked(entries)[:num_best] if token_id != actual]
    return [(token_id, entries[token_id]) for token_id in (actual, *kept)]


def _finite(logprob: float) -> float:
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
    )


def chunk_usage(
    request: CompletionRequest, prompts: Sequence[TokenizedPrompt], choices: Sequence[Choice]
) -> Usage | UnsetType | None:
    """The `usage` of a chunk that is not the last: null when a usage chunk will follow, as OpenAI does."""
    options = request.stream_options
    if options is None:
        return UNSET
    if options.continuous_usage_stats:
        return usage_of(prompts, choices)
    return None if options.include_usage else UNSET
