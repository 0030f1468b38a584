"""Spans on their way out of a process: the provider, its bounded queue, the OTLP exporter; W3C trace contexts.

Headers, certificates and compression of the exporter come from the variables that OpenTelemetry defines
(OTEL_EXPORTER_OTLP_HEADERS and others): secrets stand in no setting of ours.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.settings import ServiceSettings

SCOPE = "m3serve"
# About a kilobyte each. When the collector does not keep up, the oldest are dropped, and the SDK logs it.
MAX_QUEUED_SPANS = 16384
MAX_EXPORT_BATCH = 512
EXPORT_PERIOD_MS = 1000
EXPORT_TIMEOUT_S = 5.0
# What a process that ends waits for its last spans.
CLOSE_TIMEOUT_S = 2.0

_propagator = TraceContextTextMapPropagator()


def open_provider(
    settings: ServiceSettings, *, process: str, instance: str, engine: str | None = None
) -> TracerProvider:
    """A provider that exports to `otlp_traces_endpoint`.

    A parent's sampled flag decides; requests without a parent are sampled with `trace_sample_ratio`.
    process: "ingress" or "engine".  instance: the Serve replica.  engine: its slot.
    """
    attributes: dict[str, str | int] = {
        "service.name": "m3serve",
        "service.version": _version(),
        "service.instance.id": instance,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        "m3.process": process,
        "m3.model_name": settings.model_name,
    }
    if engine is not None:
        attributes["m3.engine"] = engine
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.trace_sample_ratio)),
        resource=Resource.create(attributes),
        # Its end is ours to make: the SDK's own would wait half a minute for a collector that is gone.
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=settings.otlp_traces_endpoint, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=MAX_QUEUED_SPANS,
            schedule_delay_millis=EXPORT_PERIOD_MS,
            max_export_batch_size=MAX_EXPORT_BATCH,
        )
    )
    return provider


def close_provider(provider: TracerProvider) -> None:
    """Send what is queued, within CLOSE_TIMEOUT_S; what is left then is lost."""
    thread = threading.Thread(target=provider.shutdown, name="m3-traces-close", daemon=True)
    thread.start()
    thread.join(CLOSE_TIMEOUT_S)


def parent_of(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    """The caller's trace context in these HTTP headers (names in lower case); empty when there is none or it is
    malformed, as W3C Trace Context wants."""
    parents, states = [], []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value.decode("latin-1"))
        elif name == b"tracestate":
            states.append(value.decode("latin-1"))
    if len(parents) != 1:
        return Context()
    return _propagator.extract({"traceparent": parents[0], "tracestate": ",".join(states)}, Context())


def parent_from(trace_parent: str) -> Context:
    """The context that `trace_parent_of` wrote; empty when it is malformed."""
    return _propagator.extract({"traceparent": trace_parent}, Context())


def trace_parent_of(span: Span) -> str:
    """W3C traceparent of a span, for the process that goes on with the request."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, set_span_in_context(span, Context()))
    return carrier["traceparent"]


def _version() -> str:
    try:
        return version("m3serve")
    except PackageNotFoundError:
        return "source"
