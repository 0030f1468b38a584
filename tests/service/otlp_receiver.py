"""A collector for tests: takes traces by OTLP over HTTP and lets a test look at their spans."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.cluster import LOOPBACK, wait_until


@dataclass(frozen=True)
class Span:
    """One span as it came over the wire. Ids in hex; parent_id is empty at a root; times in Unix nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    trace_state: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    started_ns: int
    ended_ns: int
    failed: bool
    message: str
    resource: dict[str, Any]


class Trace:
    """The spans of one trace so far."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans

    def named(self, name: str) -> list[Span]:
        """In order of their beginning."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.started_ns)

    def one(self, name: str) -> Span:
        [span] = self.named(name)
        return span

    def children(self, parent: Span) -> list[Span]:
        found = (span for span in self.spans if span.parent_id == parent.span_id)
        return sorted(found, key=lambda span: span.started_ns)


class OtlpReceiver:
    """Listens on a free port of the loopback until `close`."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                receiver._take(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                """Tests need no access log."""

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self._server.server_address[1]}/v1/traces"

    def trace(self, trace_id: str) -> Trace:
        with self._lock:
            return Trace([span for span in self._spans if span.trace_id == trace_id])

    def wait(self, trace_id: str, complete: Callable[[Trace], bool], *, timeout_s: float = 15.0) -> Trace:
        """The trace, once it is complete."""
        wait_until(lambda: complete(self.trace(trace_id)), timeout_s=timeout_s, what=f"a complete trace {trace_id}")
        return self.trace(trace_id)

    def find(self, name: str, **attributes: Any) -> list[Span]:
        """Spans of any trace. attributes: their names with _ for dots."""
        with self._lock:
            spans = list(self._spans)
        wanted = attributes.items()
        return [
            span
            for span in spans
            if span.name == name and wanted <= {key.replace(".", "_"): v for key, v in span.attributes.items()}.items()
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def _take(self, request: ExportTraceServiceRequest) -> None:
        spans = [
            _span(span, _attributes(part.resource.attributes))
            for part in request.resource_spans
            for scope in part.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += spans


def _span(span: ProtoSpan, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        trace_state=span.trace_state,
        attributes=_attributes(span.attributes),
        events=[(event.name, _attributes(event.attributes)) for event in span.events],
        started_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        message=span.status.message,
        resource=resource,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pair: KeyValue
    for pair in pairs:
        found[pair.key] = _value(pair.value)
    return found


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)
    return getattr(value, str(kind))
