"""What ingress and engine replica say to each other: submits over the Serve handle, the rest over sockets."""

from __future__ import annotations

import msgspec

from engine.errors import M3Error, Overloaded, RequestError
from engine.types import EngineRequest, FinishReason, RequestEvent


class Submit(msgspec.Struct):
    """Requests that leave together. Their ids are unique over all ingress processes and attempts.

    endpoint, token: of the socket where the sender wants the events.
    """

    submit_id: int
    endpoint: str
    token: bytes
    requests: list[EngineRequest]


class Accepted(msgspec.Struct):
    """A submit arrived at a replica, which takes aborts at this endpoint."""

    submit_id: int
    replica_id: str
    control_endpoint: str
    control_token: bytes


class Refusal(msgspec.Struct):
    """Why the engine does not run a request. retry_after_s: set when it may be sent again, unchanged."""

    request_id: str
    message: str
    param: str | None = None
    code: str = ""
    retry_after_s: float | None = None

    def error(self) -> M3Error:
        """The exception that the refusing side raised."""
        if self.retry_after_s is not None:
            return Overloaded(self.message, retry_after_s=self.retry_after_s)
        return RequestError(self.message, param=self.param, code=self.code)


class StepEvents(msgspec.Struct):
    """What one engine step did for all requests of one ingress."""

    events: list[RequestEvent]
    refusals: list[Refusal]


class Ended(msgspec.Struct):
    """How a request ended, for the ingress to compare with what it received.

    num_output_tokens: all of the request's, those that an earlier replica delivered included.
    """

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    finish_reason: FinishReason | None
    refusal: Refusal | None = None


class SubmitReply(msgspec.Struct):
    """The answer to a submit, when all its requests have ended or the worker group is lost (`dead`: the cause)."""

    ended: list[Ended]
    dead: str | None = None


class Abort(msgspec.Struct):
    """Requests that nobody waits for any more."""

    request_ids: list[str]
