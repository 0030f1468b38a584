"""What /v1/completions makes of a choice, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from engine.types import Logprobs, RequestEvent, SamplingParams
from service.choice import Choice, TokenizedPrompt, actual_and_best, finite, ranked
from service.protocol import CompletionChoice, CompletionLogprobs, CompletionRequest, TokenLogprob


class TextChoice(Choice):
    """A choice of a completion: text, after the prompt where `echo` asks for it."""

    def __init__(
        self, index: int, prompt: TokenizedPrompt, request: CompletionRequest, sampling: SamplingParams
    ) -> None:
        super().__init__(index, prompt, request, sampling)
        self._request = request
        self._offset = len(prompt.echo[0]) if request.echo else 0
        self._text: list[str] = []
        self._logprobs = CompletionLogprobs()
        self._prompt_logprobs: list[Logprobs | None] | None = None
        self._prompt_is_new = False

    def take(self) -> CompletionChoice | None:
        text = "".join(self._text)
        has_logprobs = bool(self._logprobs.tokens)
        if not (text or has_logprobs or self._token_ids or self._prompt_is_new or self.finish_reason):
            return None
        choice = CompletionChoice(
            index=self.index,
            text=text,
            logprobs=self._logprobs if self._wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        if self._returns_token_ids:
            choice.token_ids = self._token_ids
            if self._prompt_is_new:
                choice.prompt_token_ids = self._prompt.token_ids
        if self._prompt_is_new and self._request.prompt_logprobs is not None:
            choice.prompt_logprobs = self._prompt_logprobs_answer(self._request.prompt_logprobs)
        self._text, self._token_ids, self._prompt_is_new = [], [], False
        self._logprobs = CompletionLogprobs()
        return choice

    def whole(self) -> CompletionChoice:
        choice = self.take()
        assert choice is not None, "a complete choice has a finish_reason"
        return choice

    def _begin(self, event: RequestEvent) -> None:
        self._prompt_logprobs = event.prompt_logprobs
        request = self._request
        self._prompt_is_new = self._returns_token_ids or request.prompt_logprobs is not None
        if not request.echo:
            return
        text, offsets = self._prompt.echo
        self._text.append(text)
        if self._wants_logprobs:
            assert event.prompt_logprobs is not None, "the engine left out the prompt's log-probabilities"
            positions = zip(self._prompt.token_ids, event.prompt_logprobs, offsets, strict=True)
            for token_id, entries, offset in positions:
                self._append_logprobs(token_id, entries, offset)

    def _extend(self, event: RequestEvent) -> bool:
        if not self._request.generates_nothing:
            return super()._extend(event)
        self.finish_reason = event.finish_reason and event.finish_reason.value
        return event.finish_reason is not None

    def _add_tokens(self, token_ids: Sequence[int], text: str) -> None:
        self._text.append(text)

    def _add_logprobs(self, token_id: int, entries: Logprobs, offset: int) -> None:
        self._append_logprobs(token_id, entries, self._offset + offset)

    def _append_logprobs(self, token_id: int, entries: Logprobs | None, offset: int) -> None:
        """One position; entries is None at the prompt's first token, which nothing predicts."""
        out = self._logprobs
        out.tokens.append(self._token_text(token_id))
        out.text_offset.append(offset)
        if entries is None:
            out.token_logprobs.append(None)
            out.top_logprobs.append(None)
            return
        assert self._request.logprobs is not None
        out.token_logprobs.append(finite(entries[token_id]))
        best: dict[str, float] = {}
        for other, logprob in actual_and_best(entries, self._request.logprobs):
            # Two ids may have the same text: the better one stays.
            best.setdefault(self._token_text(other), finite(logprob))
        out.top_logprobs.append(best)

    def _prompt_logprobs_answer(self, num_best: int) -> list[dict[str, TokenLogprob] | None]:
        assert self._prompt_logprobs is not None, "the engine left out the prompt's log-probabilities"
        answer: list[dict[str, TokenLogprob] | None] = []
        for entries in self._prompt_logprobs:
            if entries is None:
                answer.append(None)
                continue
            ranks = {token_id: rank for rank, token_id in enumerate(ranked(entries)[:num_best], start=1)}
            answer.append(
                {
                    str(token_id): TokenLogprob(
                        finite(logprob), ranks.get(token_id), self._prompt.tokenizer.token_text(token_id)
                    )
                    for token_id, logprob in actual_and_best(entries, num_best)
                }
            )
        return answer
