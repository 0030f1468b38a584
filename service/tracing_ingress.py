"""Spans of an ingress process: the HTTP request, each of its choices, each attempt of a choice at an engine.

Attributes follow OpenTelemetry's conventions for HTTP and generative AI where they have a name; ours start with m3.
No prompt and no text ever stands in a span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from engine.types import EngineRequest
from service.protocol import AnswerHead
from service.settings import ServiceSettings
from service.tracing_otlp import SCOPE, close_provider, open_provider, parent_of, trace_parent_of

# Probes: their spans would say nothing and come every few seconds.
UNTRACED_PATHS = frozenset({"/health", "/ready"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
MAX_CAUSE_CHARS = 200
MAX_HEADER_BYTES = 128


class IngressTracer:
    """Begins the span of each HTTP request. One per process; `close` sends what is left."""

    def __init__(self, settings: ServiceSettings, instance: str) -> None:
        self._provider = open_provider(settings, process="ingress", instance=instance)
        self._tracer = self._provider.get_tracer(SCOPE)
        self._model_name = settings.model_name

    def start(self, scope: Any) -> HttpTrace | None:
        """The trace of a request with this ASGI scope, beginning now; None when it is not sampled."""
        if scope["path"] in UNTRACED_PATHS:
            return None
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        attributes: dict[str, str | list[str]] = {
            "http.request.method": method,
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        request_ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
        if request_ids:
            attributes["http.request.header.x-request-id"] = [request_ids[0][:MAX_HEADER_BYTES].decode("latin-1")]
        span = self._tracer.start_span(method, parent_of(scope["headers"]), SpanKind.SERVER, attributes)
        return HttpTrace(self._tracer, span, method, self._model_name) if span.is_recording() else None

    def close(self) -> None:
        """Send what is queued, for a short while. Blocks."""
        close_provider(self._provider)


class HttpTrace:
    """One HTTP request that is traced."""

    def __init__(self, tracer: Tracer, span: Span, method: str, model_name: str) -> None:
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span, Context())
        self._method = method
        self._model_name = model_name

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A child span for as long as the block runs."""
        span = self._tracer.start_span(name, self._context)
        try:
            yield
        finally:
            span.end()

    def choices(self, requests: Sequence[EngineRequest], head: AnswerHead) -> list[ChoiceTrace]:
        """One span per choice, beginning now. head: of the answer that they are part of."""
        operation = "chat" if head.object.startswith("chat.") else head.object
        return [
            ChoiceTrace(
                self._tracer,
                self._context,
                index,
                request,
                operation=operation,
                model_name=self._model_name,
                response_id=head.id,
            )
            for index, request in enumerate(requests)
        ]

    def fail(self, code: str) -> None:
        """The request failed on our side. code: the machine-readable one of the error object."""
        self._span.set_attribute("error.type", code)
        self._span.set_status(Status(StatusCode.ERROR))

    def end(self, route: str | None, status: int | None, code: str | None) -> None:
        """The answer is out. status: None when the client left before it began.  code: of a refusal."""
        span = self._span
        if route is not None:
            span.update_name(f"{self._method} {route}")
            span.set_attribute("http.route", route)
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if code is not None:
            span.set_attribute("m3.error.code", code)
        # A refusal with a status below 400 came when that was out already: the body is broken.
        if status is not None and (status >= 500 or (status < 400 and code is not None)):
            self.fail(code or str(status))
        span.end()


class ChoiceTrace:
    """One choice: from its submit to its last token, over all attempts.

    trace_parent: W3C traceparent for the engine of the current attempt.
    """

    def __init__(
        self,
        tracer: Tracer,
        parent: Context,
        index: int,
        request: EngineRequest,
        *,
        operation: str,
        model_name: str,
        response_id: str,
    ) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(
            "choice",
            parent,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "m3serve",
                "gen_ai.request.model": model_name,
                "gen_ai.request.max_tokens": request.sampling.max_tokens,
                "gen_ai.request.temperature": float(request.sampling.temperature),
                "gen_ai.response.id": response_id,
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                "m3.choice.index": index,
                "m3.request.id": request.request_id,
            },
        )
        self._context = set_span_in_context(self._span, Context())
        self._attempt: Span | None = None
        self._num_attempts = 0
        self._ended = False
        self.trace_parent = ""

    def begin_attempt(self, attempt_id: str, *, num_resumed_tokens: int) -> None:
        """The choice, or the rest of it, goes to an engine. attempt_id: its name there."""
        self._num_attempts += 1
        self._attempt = self._tracer.start_span(
            "attempt",
            self._context,
            SpanKind.CLIENT,
            {
                "m3.attempt.id": attempt_id,
                "m3.attempt.number": self._num_attempts,
                "m3.resumed_tokens": num_resumed_tokens,
            },
        )
        self.trace_parent = trace_parent_of(self._attempt)

    def accepted(self, replica_id: str) -> None:
        """A replica has it."""
        if self._attempt is not None:
            self._attempt.set_attribute("m3.replica.id", replica_id)
            self._attempt.add_event("accepted")

    def failed_over(self, kind: str, cause: str) -> None:
        """The attempt is lost, and there will be another. kind: replica_lost, events_lost or
        not_accepted; cause: for people."""
        detail = (cause.splitlines() or [""])[0][:MAX_CAUSE_CHARS]
        self._span.add_event("failover", {"m3.failover.kind": kind, "m3.failover.cause": detail})
        self._end_attempt(kind)

    def end(self, reason: str, *, num_tokens: int, num_cached_tokens: int, code: str | None = None) -> None:
        """The choice is over; later calls change nothing. reason: stop, length, abort or error.  code: of the error."""
        if self._ended:
            return
        self._ended = True
        self._end_attempt((code or "error") if reason == "error" else None)
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.output_tokens": num_tokens,
                "gen_ai.usage.cache_read.input_tokens": num_cached_tokens,
                "m3.attempts": self._num_attempts,
            }
        )
        if reason == "error":
            _mark_failed(self._span, code or "error")
        self._span.end()

    def _end_attempt(self, error: str | None) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        if error is not None:
            _mark_failed(attempt, error)
        attempt.end()


def _mark_failed(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))
