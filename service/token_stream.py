"""What arrives for one request between the event socket and its reader."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

from engine.errors import EngineDead, M3Error
from engine.types import EngineRequest, FinishReason, RequestEvent
from service.settings import ServiceSettings

if TYPE_CHECKING:  # at run time only where tracing is on
    from service.tracing_ingress import ChoiceTrace


class TokenStream:
    """One request of a caller, over all its attempts.

    submit_id: of the submit that carries the attempt.  accept_by_s: time.monotonic() by when a replica must have
    accepted it.  num_refused: submits in a row that none accepted.  was_accepted: whether some replica ever did.
    identity: of the replica that took it last (see Description).  num_retries: how often a replica that had it was
    lost.  lost_s: time.monotonic() of that, until it goes on.
    """

    def __init__(self, request: EngineRequest, max_undelivered_tokens: int, trace: ChoiceTrace | None = None) -> None:
        self.request = request
        self.trace = trace
        self.token_ids = list(request.output_token_ids)
        self.attempt_id = ""
        self.submit_id = 0
        self.accept_by_s = 0.0
        self.num_refused = 0
        self.was_accepted = False
        self.identity: str | None = None
        self.num_retries = 0
        self.lost_s: float | None = None
        self.ended = False
        self._max_undelivered_tokens = max_undelivered_tokens
        self._num_cached_tokens: int | None = None
        self._pending: RequestEvent | None = None
        self._error: M3Error | None = None
        self._wake = asyncio.Event()

    def attempt(self) -> EngineRequest:
        """What is left of the request, under the name of its attempt."""
        return dataclasses.replace(
            self.request,
            request_id=self.attempt_id,
            output_token_ids=self.token_ids,
            resubmitted=self.was_accepted,
            trace_parent=None if self.trace is None else self.trace.trace_parent,
        )

    def push(self, event: RequestEvent) -> bool:
        """Take the engine's next event; False when one before it is missing."""
        if event.index != len(self.token_ids):
            return False
        self.token_ids += event.token_ids
        event.request_id = self.request.request_id
        if self._num_cached_tokens is None:
            self._num_cached_tokens = event.num_cached_tokens
        # After a failover the replica may find tokens in its cache that this stream had delivered.
        event.num_cached_tokens = self._num_cached_tokens
        self.ended = event.finish_reason is not None
        self._pending = event if self._pending is None else _merge(self._pending, event)
        if len(self._pending.token_ids) > self._max_undelivered_tokens and not self.ended:
            self._pending.finish_reason = FinishReason.ERROR
            self._pending.error = (
                f"the client reads too slowly: {len(self._pending.token_ids)} tokens wait for it, "
                f"limit {self._max_undelivered_tokens} (max_undelivered_tokens)"
            )
            self.ended = True
        self._wake.set()
        return True

    def fail(self, error: M3Error) -> None:
        """End the stream with an exception, after what is still to be delivered."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._wake.set()

    def late(self, settings: ServiceSettings) -> EngineDead:
        """Why a stream ends whose `accept_by_s` has passed."""
        name = "failover_timeout_s" if self.was_accepted else "submit_timeout_s"
        return EngineDead(f"no engine replica accepted the request within {getattr(settings, name):g} s ({name})")

    async def next(self) -> RequestEvent:
        """Everything that arrived since the last call, as one event. Waits while there is nothing.

        The client's sweep ends a stream that no replica takes, and Serve replaces a replica that is stuck: both
        end this wait.
        """
        while self._pending is None:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        event, self._pending = self._pending, None
        return event


def _merge(first: RequestEvent, second: RequestEvent) -> RequestEvent:
    """Both events as one; `first` is changed."""
    first.token_ids += second.token_ids
    if second.logprobs is not None:
        first.logprobs = (first.logprobs or []) + second.logprobs
    if second.prompt_logprobs is not None:
        first.prompt_logprobs = second.prompt_logprobs
    first.finish_reason = second.finish_reason
    first.stop_token_id = second.stop_token_id
    first.error = second.error
    return first
