"""The door to OpenTelemetry: what is needed to know whether requests are traced, without loading it.

Tracing is off unless `otlp_traces_endpoint` is set. Then each process loads the module of its part by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from service.settings import ServiceSettings

if TYPE_CHECKING:  # at run time only where tracing is on
    from service.tracing_engine import EngineTracer
    from service.tracing_ingress import IngressTracer

_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def check(settings: ServiceSettings) -> None:
    """ConfigError when tracing is on and its packages are missing."""
    if settings.otlp_traces_endpoint is None:
        return
    missing = [name for name in _NEEDED if not _is_there(name)]
    if missing:
        raise ConfigError(
            f"otlp_traces_endpoint is set and needs {' and '.join(missing)}, not installed here: "
            "pip install 'm3serve[traces]'"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def open_ingress(settings: ServiceSettings, instance: str) -> IngressTracer | None:
    """The tracer of an ingress process; None when tracing is off. instance: the replica's name. Raises ConfigError."""
    if settings.otlp_traces_endpoint is None:
        return None
    check(settings)
    tracer: IngressTracer = importlib.import_module("service.tracing_ingress").IngressTracer(settings, instance)
    return tracer


def open_engine(settings: ServiceSettings, instance: str, engine: str) -> EngineTracer | None:
    """As `open_ingress`, for an engine replica. engine: its slot."""
    if settings.otlp_traces_endpoint is None:
        return None
    check(settings)
    tracer: EngineTracer = importlib.import_module("service.tracing_engine").EngineTracer(settings, instance, engine)
    return tracer
