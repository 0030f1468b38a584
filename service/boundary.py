"""The HTTP boundary: exceptions become answers, bodies are read up to a limit, answers are counted."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, ClassVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import RequestError
from service.errors import BodyTimeout, BodyTooLarge, ErrorAnswer, UnsupportedMediaType, answer, is_expected
from service.metrics import HTTP_IN_FLIGHT, HTTP_REQUESTS
from service.series import CpuSeries, IngressSeries

if TYPE_CHECKING:  # at run time only where tracing is on
    from service.tracing_ingress import IngressTracer

log = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128
# A client that stalls in the middle of its body would hold a request slot for ever.
BODY_TIMEOUT_S = 60.0
_JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")


def report(error: BaseException, request_id: str) -> ErrorAnswer:
    """The answer to an exception; one that nobody planned for is logged under the request's id."""
    if not is_expected(error):
        log.error("request %s failed", request_id, exc_info=error)
    return answer(error)


class Boundary:
    """ASGI middleware around the whole application.

    Serve's own middleware makes or echoes x-request-id in the answer; here it is only checked and logged.
    A handler that leaves its IngressSeries in `request.state.series` has its refusals counted, and finds the
    request's HttpTrace, or None, in `request.state.trace`.

    tracer: of this process, set before its first request; None when tracing is off.
    """

    tracer: ClassVar[IngressTracer | None] = None

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._cpu = CpuSeries("ingress")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        code: str | None = None
        trace = None if self.tracer is None else self.tracer.start(scope)
        state = scope.setdefault("state", {})
        state["trace"] = trace
        HTTP_IN_FLIGHT.inc()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        request_id = Headers(scope=scope).get("x-request-id", "")
        try:
            request_id = check_request_id(request_id)
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as error:
            refusal = report(error, request_id[:MAX_REQUEST_ID_CHARS])
            code = refusal.code
            if status is not None:
                raise  # a broken body must not look complete
            series: IngressSeries | None = state.get("series")
            if series is not None:
                series.count_refusal(refusal.code)
            await send_answer(refusal, watched_send)
        finally:
            # Left out: requests whose client went away before an answer began.
            self._cpu.update()
            HTTP_IN_FLIGHT.dec()
            route: str | None = getattr(scope.get("route"), "path", None)
            if status is not None:
                HTTP_REQUESTS.labels(route or "unknown", str(status)).inc()
            if trace is not None:
                trace.end(route, status, code)


def check_request_id(request_id: str) -> str:
    """The client's x-request-id goes into logs, so it must be short and printable."""
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise RequestError(
            f"x-request-id has {len(request_id)} characters, at most {MAX_REQUEST_ID_CHARS} are allowed",
            param="x-request-id",
        )
    if not (request_id.isascii() and request_id.isprintable()):
        raise RequestError("x-request-id must be printable ASCII", param="x-request-id")
    return request_id


async def send_answer(refusal: ErrorAnswer, send: Send) -> None:
    """An error object as a complete HTTP answer."""
    body = refusal.json()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """The whole JSON body. Stops reading at the limit; refuses what is not declared as JSON."""
    headers = Headers(scope=scope)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _JSON_TYPE.fullmatch(media_type):
        given = repr(media_type[:MAX_REQUEST_ID_CHARS]) if media_type else "none"
        raise UnsupportedMediaType(f"content-type must be application/json, got {given}", code="unsupported_media_type")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(f"{declared} bytes", max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect()
                chunk = message.get("body", b"")
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(f"more than {max_bytes} bytes", max_bytes)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise BodyTimeout(
            f"the body did not arrive within {timeout_s:g} s: {num_bytes} bytes came", code="body_timeout"
        ) from None


def _too_large(given: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {given}, at most {max_bytes} are allowed", code="request_too_large")
