"""One table from exception to HTTP answer, and the OpenAI error object.

Code below the HTTP boundary raises; only here does an exception become a status.
"""

from __future__ import annotations

import http
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException

from engine.errors import EngineDead, M3Error, Overloaded, RequestError, shortened

# A message may quote what the client sent; an answer must not grow with it.
MAX_MESSAGE_CHARS = 1000
# What a client is told to wait before it tries again, elsewhere or at a service that is back.
SHUTDOWN_RETRY_S = 5


class NotFound(RequestError):
    """The request names a model that is not served here."""


class BodyTooLarge(RequestError):
    """The request body exceeds the limit; reading stops there."""


class BodyTimeout(RequestError):
    """The request body did not arrive in time."""


class UnsupportedMediaType(RequestError):
    """The body is not declared as JSON."""


class Unauthorized(RequestError):
    """The request has no valid API key."""


class DeadlineExceeded(M3Error):
    """The time that the client or the server sets for a request is over."""


class ShuttingDown(M3Error):
    """This HTTP front finishes what it has, and takes nothing new."""


class GenerationFailed(M3Error):
    """The engine ended a request with an error of its own; the message says why."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's error object. param: the field at fault, null when no single field is."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """What stands in the body of a refusal, or in the `data:` of a broken stream."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """A refusal, ready to send."""

    status: int
    body: ErrorBody
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def code(self) -> str:
        """The machine-readable reason, from a fixed set."""
        return self.body.error.code

    def json(self) -> bytes:
        return msgspec.json.encode(self.body)


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    type: str
    code: str


# The most specific class first: the first row that fits answers.
_TABLE: tuple[tuple[type[Exception], _Row], ...] = (
    (NotFound, _Row(404, "invalid_request_error", "model_not_found")),
    (BodyTooLarge, _Row(413, "invalid_request_error", "request_too_large")),
    (Unauthorized, _Row(401, "invalid_request_error", "invalid_api_key")),
    (DeadlineExceeded, _Row(408, "timeout_error", "deadline_exceeded")),
    (BodyTimeout, _Row(408, "invalid_request_error", "body_timeout")),
    (UnsupportedMediaType, _Row(400, "invalid_request_error", "unsupported_media_type")),
    (RequestError, _Row(400, "invalid_request_error", "invalid_value")),
    (Overloaded, _Row(429, "rate_limit_error", "engine_overloaded")),
    (EngineDead, _Row(503, "service_unavailable_error", "engine_unavailable")),
    (ShuttingDown, _Row(503, "service_unavailable_error", "shutting_down")),
    (GenerationFailed, _Row(500, "server_error", "generation_failed")),
)
_UNEXPECTED = _Row(500, "server_error", "internal_error")
_HTTP_CODES = {404: "unknown_route", 405: "method_not_allowed"}


def is_expected(error: BaseException) -> bool:
    """Whether the table knows this exception; one that it does not know is a bug and belongs in the log."""
    return isinstance(error, (HTTPException, *(kind for kind, _ in _TABLE)))


def answer(error: BaseException) -> ErrorAnswer:
    """The HTTP answer to an exception. An unexpected one says nothing about our insides."""
    if isinstance(error, HTTPException):
        return _http_answer(error)
    for kind, row in _TABLE:
        if isinstance(error, kind):
            return _known_answer(error, row)
    message = "internal error: the server's log has the details under this response's x-request-id"
    return _make(_UNEXPECTED, message)


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """RequestErrors of the block name their field as the request does. names: by the name that the block knows."""
    try:
        yield
    except RequestError as error:
        if error.param not in names:
            raise
        raise RequestError(error.message, param=names[error.param], code=error.code) from None


def _known_answer(error: Exception, row: _Row) -> ErrorAnswer:
    if isinstance(error, RequestError):
        headers = (("www-authenticate", "Bearer"),) if isinstance(error, Unauthorized) else ()
        return _make(_Row(row.status, row.type, error.code), error.message, param=error.param, headers=headers)
    if isinstance(error, Overloaded):
        wait_s = max(1, math.ceil(error.retry_after_s))
        return _make(row, str(error), headers=(("retry-after", str(wait_s)),))
    if isinstance(error, ShuttingDown):
        return _make(row, str(error), headers=(("retry-after", str(SHUTDOWN_RETRY_S)),))
    return _make(row, str(error))


def _http_answer(error: HTTPException) -> ErrorAnswer:
    """What the router itself refuses: an unknown path, or a method that a path does not have."""
    code = _HTTP_CODES.get(error.status_code, http.HTTPStatus(error.status_code).name.lower())
    row = _Row(error.status_code, "invalid_request_error", code)
    return _make(row, error.detail, headers=tuple((error.headers or {}).items()))


def _make(
    row: _Row, message: str, *, param: str | None = None, headers: tuple[tuple[str, str], ...] = ()
) -> ErrorAnswer:
    detail = ErrorDetail(shortened(message, MAX_MESSAGE_CHARS), row.type, param, row.code)
    return ErrorAnswer(row.status, ErrorBody(detail), headers)
