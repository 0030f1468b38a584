"""What ingress and engine replica say to each other: submits over the Serve handle, the rest over sockets."""

from __future__ import annotations

import msgspec

from engine.errors import M3Error, Overloaded, RequestError
from engine.types import EngineInfo, EngineRequest, FinishReason, RequestEvent

# When there may be room again in a queue that is full.
RETRY_AFTER_S = 1.0


def full_queue(num_requests: int, limit: int) -> Overloaded:
    """The refusal of one request more than `limit`."""
    return Overloaded(
        f"the queue is full: {num_requests} requests are running or waiting, "
        f"limit {limit} (max_num_seqs + max_queued_requests)",
        retry_after_s=RETRY_AFTER_S,
    )


class Load(msgspec.Struct, frozen=True):
    """What an engine replica has to do, for all ingresses.

    replica_id: its name in Serve.  tokens: prompt and output tokens of its requests, running and waiting.  requests:
    how many these are.  full_tokens, full_requests: at these it is full, and another replica would help.
    max_requests: it refuses more.
    """

    replica_id: str
    tokens: int
    requests: int
    full_tokens: int
    full_requests: int
    max_requests: int

    @property
    def share(self) -> float:
        """1 when the replica is full, more when requests wait."""
        return max(self.tokens / self.full_tokens, self.requests / self.full_requests)

    def plus(self, tokens: int, requests: int) -> Load:
        """With so many more."""
        return msgspec.structs.replace(self, tokens=self.tokens + tokens, requests=self.requests + requests)


class Submit(msgspec.Struct):
    """Requests that leave together. Their ids are unique over all ingress processes and attempts.

    endpoint, token: of the socket where the sender wants the events.  model: that the requests are made for, None: any.
    identity: of the replica that gave them their tokens so far; None: they have none.
    """

    submit_id: int
    endpoint: str
    token: bytes
    requests: list[EngineRequest]
    model: str | None = None
    identity: str | None = None


class Accepted(msgspec.Struct):
    """A submit arrived at a replica, which takes aborts at this endpoint. identity: see Description."""

    submit_id: int
    replica_id: str
    control_endpoint: str
    control_token: bytes
    load: Load | None = None
    identity: str = ""


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
    """What one engine step did for all requests of one ingress. load: of the replica then."""

    events: list[RequestEvent]
    refusals: list[Refusal]
    load: Load | None = None


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


class Description(msgspec.Struct):
    """What a replica runs.

    model: its name and tokenizer: prompts made for another one mean nothing here.  identity: all that decides which
    token comes next: checkpoint, index plan, number formats. A stream that has tokens goes on under the same one alone.
    """

    replica_id: str
    model: str
    identity: str
    info: EngineInfo


class SubmitReply(msgspec.Struct):
    """The answer to a submit, when all its requests have ended or the worker group is lost (`dead`: the cause).

    unfit: nothing was run, since the requests are for another model or began under another identity; this is the
    replica's.
    """

    ended: list[Ended]
    dead: str | None = None
    unfit: Description | None = None


class Abort(msgspec.Struct):
    """Requests that nobody waits for any more."""

    request_ids: list[str]
