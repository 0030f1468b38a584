"""Server-sent events: framing, and a response that always closes what feeds it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def event(payload: Any) -> bytes:
    """One event. JSON escapes line breaks, so the payload is always a single `data:` line."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


class EventSource(Protocol):
    """What feeds a stream: a context that owns whatever runs behind it."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def start(self) -> None:
        """Get ready for the first piece. What it raises becomes a real HTTP status."""

    def pieces(self) -> AsyncGenerator[bytes, None]:
        """One or more whole events each; ends with DONE."""


class EventStream(Response):
    """Sends each piece of a source at once, and leaves the source's context in every case.

    Starlette's StreamingResponse leaves a generator to the garbage collector when the client disconnects
    while a piece is being sent; the engine would run on.
    """

    media_type = "text/event-stream"

    def __init__(self, source: EventSource) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._source as source, aclosing(source.pieces()) as pieces:
            await source.start()
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
