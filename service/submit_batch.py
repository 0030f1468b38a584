"""One submit on its way, and the replica's account of it compared with what arrived."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from ray.serve.exceptions import BackPressureError

from engine.errors import EngineDead, Overloaded
from service.messages import Ended, SubmitReply
from service.routing import Ticket
from service.token_stream import TokenStream

log = logging.getLogger(__name__)

_decoder = msgspec.msgpack.Decoder(SubmitReply)


@dataclass(slots=True)
class SubmitBatch:
    """Requests that left together.

    attempt_ids: of its requests.  sent_s: time.monotonic().  on_its_way: done when a replica has it, or none will.
    tickets: of the choice of its replica.  call: open until all its requests have ended.  epoch, replica_id: of the
    replica that accepted it; None: none did yet.  num_delivered: tokens of the attempts whose last event came.
    """

    submit_id: int
    attempt_ids: list[str]
    sent_s: float
    on_its_way: asyncio.Future[None]
    tickets: list[Ticket] = field(default_factory=list)
    call: asyncio.Task[None] | None = None
    epoch: int | None = None
    replica_id: str | None = None
    num_delivered: dict[str, int] = field(default_factory=dict)

    @property
    def replica(self) -> str:
        """Who was to run it, for people."""
        return "an engine replica" if self.replica_id is None else f"engine replica {self.replica_id}"

    def release(self) -> None:
        """Let the next submit leave."""
        for ticket in self.tickets:
            ticket.close()
        if not self.on_its_way.done():
            self.on_its_way.set_result(None)

    def open_streams(self, streams: Mapping[str, TokenStream]) -> dict[str, TokenStream]:
        """Those of its attempts that have not ended, by their ids."""
        return {name: streams[name] for name in self.attempt_ids if name in streams}

    def cancel(self) -> None:
        """Give the call up, wherever it is."""
        if self.call is not None:
            self.call.cancel()

    def num_mismatches(self, reply: SubmitReply) -> int:
        """How many attempts ended for their readers with another number of tokens than the replica counted.

        It comes too late for them: a gap that can be filled shows earlier, in the index of an event.
        """
        accounts = {ended.request_id: ended for ended in reply.ended}
        wrong = 0
        for name, num_tokens in self.num_delivered.items():
            account = accounts.get(name)
            if account is None or account.num_output_tokens != num_tokens:
                log.error("attempt %s: %d tokens were delivered, the replica says %s", name, num_tokens, account)
                wrong += 1
        return wrong


async def call_replica(handle: Any, payload: bytes, target: str | None) -> SubmitReply:
    """Submit through a Serve handle. Raises Overloaded when no replica takes more calls, EngineDead when the replica's
    end of the call was cancelled, and whatever Ray raises for a replica that died."""
    response = handle.submit.remote(payload, target=target)
    try:
        return _decoder.decode(await response)
    except BackPressureError as error:
        raise Overloaded(str(error), retry_after_s=1.0) from error
    except asyncio.CancelledError as error:
        # Otherwise a call that waits for a replica would still reach the next one.
        response.cancel()
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Not by us: Ray says so when the replica's end was cancelled.
        raise EngineDead("the call was cancelled") from error


def describe_gap(stream: TokenStream, account: Ended | None) -> str:
    """Why a stream goes on though its replica is done with it."""
    if account is None:
        return "the replica did not account for the request"
    return (
        f"the replica ended the request ({account.finish_reason}) after {account.num_output_tokens} tokens, "
        f"{len(stream.token_ids)} arrived"
    )
