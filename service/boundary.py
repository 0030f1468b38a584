"""The HTTP boundary: exceptions become answers, bodies are read up to a limit, answers are counted."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineDead, RequestError
from service.auth import ApiKeys
from service.errors import (
    BodyTimeout,
    BodyTooLarge,
    DeadlineExceeded,
    ErrorAnswer,
    ShuttingDown,
    UnsupportedMediaType,
    answer,
    is_expected,
)
from service.limits import BodyBudget, check_disconnect, read_timeout
from service.metrics import HTTP_IN_FLIGHT, HTTP_REQUESTS
from service.series import CpuSeries, IngressSeries

if TYPE_CHECKING:  # at run time only where tracing is on
    from service.tracing_ingress import IngressTracer

log = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128
# A client that stalls in the middle of its body would hold a request slot for ever.
BODY_TIMEOUT_S = 60.0
DEADLINE_MESSAGE = "the request took longer than it may: see x-request-timeout-seconds and request_timeout_s"
# Probes have no key.
PUBLIC_PATHS = frozenset({"/health", "/ready"})
# Nor has a browser that opens the page: the page's own requests have.
PAGE_PATH = "/"
_JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")


def report(error: BaseException, request_id: str) -> ErrorAnswer:
    """The answer to an exception; one that nobody planned for is logged under the request's id."""
    if not is_expected(error):
        log.error("request %s failed", request_id, exc_info=error)
    return answer(error)


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may use this process, and for how long.

    keys: None: everybody.  request_timeout_s: of a request without a header of its own; None: no limit.
    public_paths: open to everybody.
    """

    keys: ApiKeys | None = None
    request_timeout_s: float | None = None
    cors_allow_origins: tuple[str, ...] = ()
    public_paths: frozenset[str] = PUBLIC_PATHS


class Boundary:
    """ASGI middleware around the whole application.

    Serve's own middleware makes or echoes x-request-id in the answer; here it is only checked and logged.
    A handler that leaves its IngressSeries in `request.state.series` has its refusals counted. It finds the request's
    HttpTrace, or None, in `request.state.trace`, and in `request.state.deadline_s` the event loop's time by which the
    answer must have ended, or None. Until the answer begins, the deadline is kept here; after that by what streams it.

    policy, tracer: of this process, set before its first request; a tracer of None: tracing is off.
    is_draining: nothing new is taken.  num_running: requests that were taken and have not ended.
    """

    policy: ClassVar[Policy | None] = None
    tracer: ClassVar[IngressTracer | None] = None
    is_draining: ClassVar[bool] = False
    num_running: ClassVar[int] = 0

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._cpu = CpuSeries("ingress")
        self._cors: CORSMiddleware | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Outermost: browsers send no key with their preflight, and scripts may read errors too.
        origins = self.policy.cors_allow_origins if self.policy is not None else ()
        if not origins:
            await self._answer(scope, receive, send)
            return
        if self._cors is None:
            self._cors = CORSMiddleware(
                self._answer,
                allow_origins=origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("x-request-id", "retry-after", "www-authenticate"),
            )
        await self._cors(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
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

        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        try:
            state["deadline_s"] = deadline_s = self._admit(scope, headers)
            Boundary.num_running += 1
            try:
                await self._run(scope, receive, watched_send, deadline_s)
            finally:
                Boundary.num_running -= 1
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

    def _admit(self, scope: Scope, headers: Headers) -> float | None:
        """The deadline of a request that may enter. Raises the refusal of one that may not."""
        if self.policy is None:
            raise EngineDead("this HTTP front is starting")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.policy.keys is not None and path not in self.policy.public_paths:
            self.policy.keys.check(headers)
        if self.is_draining and path != "/health":
            raise ShuttingDown("the service is shutting down: it finishes what it has, and takes no new request")
        check_request_id(headers.get("x-request-id", ""))
        check_disconnect(headers)
        timeout_s = read_timeout(headers, self.policy.request_timeout_s)
        return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    async def _run(self, scope: Scope, receive: Receive, send: Send, deadline_s: float | None) -> None:
        """The application itself. DeadlineExceeded when its answer has not begun in time."""
        if deadline_s is None:
            await self._app(scope, receive, send)
            return

        async def begins(message: Message) -> None:
            if message["type"] == "http.response.start" and not limit.expired():
                limit.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout_at(deadline_s) as limit:
                await self._app(scope, receive, begins)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(DEADLINE_MESSAGE) from None


def check_request_id(request_id: str) -> None:
    """The client's x-request-id goes into logs, so it must be short and printable."""
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise RequestError(
            f"x-request-id has {len(request_id)} characters, at most {MAX_REQUEST_ID_CHARS} are allowed",
            param="x-request-id",
        )
    if not (request_id.isascii() and request_id.isprintable()):
        raise RequestError("x-request-id must be printable ASCII", param="x-request-id")


async def send_answer(refusal: ErrorAnswer, send: Send) -> None:
    """An error object as a complete HTTP answer."""
    body = refusal.json()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(
    scope: Scope, receive: Receive, *, max_bytes: int, budget: BodyBudget, timeout_s: float = BODY_TIMEOUT_S
) -> bytes:
    """The whole JSON body. Stops reading at the limit; refuses what is not declared as JSON."""
    headers = Headers(scope=scope)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _JSON_TYPE.fullmatch(media_type):
        given = repr(media_type[:MAX_REQUEST_ID_CHARS]) if media_type else "none"
        raise UnsupportedMediaType(f"content-type must be application/json, got {given}", code="unsupported_media_type")
    declared = headers.get("content-length", "")
    # Compared as text: a number of thousands of digits cannot be converted.
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(f"{declared[:20]} bytes", max_bytes)
    body = bytearray()
    try:
        with budget.body() as take:
            async with asyncio.timeout(timeout_s):
                async for chunk in _chunks(receive):
                    if len(body) + len(chunk) > max_bytes:
                        raise _too_large(f"more than {max_bytes} bytes", max_bytes)
                    take(len(chunk))
                    body += chunk
    except TimeoutError:
        raise BodyTimeout(
            f"the body did not arrive within {timeout_s:g} s: {len(body)} bytes came", code="body_timeout"
        ) from None
    return bytes(body)


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect()
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _too_large(given: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {given}, at most {max_bytes} are allowed", code="request_too_large")
