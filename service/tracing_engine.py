"""Spans of an engine replica, made of timelines when requests end: engine, its phases, and the steps in them."""

from __future__ import annotations

import logging
import queue
import threading
import time

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from engine.timeline import StepTime, Timeline
from service.settings import ServiceSettings
from service.tracing_otlp import CLOSE_TIMEOUT_S, SCOPE, open_provider, parent_from

log = logging.getLogger(__name__)

# Requests that ended and have no spans yet; more are dropped.
MAX_PENDING_TIMELINES = 1024


class EngineTracer:
    """Makes spans on a thread of its own, so that neither the scheduler nor the sockets wait for them.

    engine: the replica's slot.
    """

    def __init__(self, settings: ServiceSettings, instance: str, engine: str) -> None:
        self._provider = open_provider(settings, process="engine", instance=instance, engine=engine)
        self._tracer = self._provider.get_tracer(SCOPE)
        self._own: dict[str, str | int | list[str]] = {"m3.engine": engine, "m3.replica.id": instance}
        self._pending: queue.Queue[Timeline | None] = queue.Queue(MAX_PENDING_TIMELINES)
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="m3-traces", daemon=True)
        self._thread.start()

    def add(self, timelines: list[Timeline]) -> None:
        """Requests that ended. Never blocks; what does not fit is dropped and counted. Any thread."""
        for timeline in timelines:
            try:
                self._pending.put_nowait(timeline)
            except queue.Full:
                self.num_dropped += 1
                if self.num_dropped == 1:
                    log.warning("traces are dropped: %d requests wait for their spans", MAX_PENDING_TIMELINES)

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Send what is there, for so long. Blocks."""
        try:
            self._pending.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (timeline := self._pending.get()) is not None:
            try:
                self._emit(timeline)
            except Exception:
                # A trace is not worth the thread that makes all others.
                log.exception("no spans for request %s", timeline.request_id)
        self._provider.shutdown()

    def _emit(self, timeline: Timeline) -> None:
        wall = _WallClock()
        engine = self._tracer.start_span(
            "engine",
            parent_from(timeline.trace_parent),
            SpanKind.SERVER,
            self._own | _attributes(timeline),
            start_time=wall.ns(timeline.arrival_s),
        )
        if not engine.is_recording():
            return
        for preempted_s in timeline.preempted_s:
            engine.add_event("preempted", timestamp=wall.ns(preempted_s))
        if timeline.error is not None:
            engine.set_status(Status(StatusCode.ERROR, timeline.error))
            engine.set_attribute("error.type", "engine_lost" if timeline.finish_reason is None else "generation_failed")
        context = set_span_in_context(engine, Context())
        bounds = _phases(timeline)
        phases = {
            name: self._tracer.start_span(name, context, start_time=wall.ns(started_s))
            for name, (started_s, _) in bounds.items()
        }
        contexts = {name: set_span_in_context(span, Context()) for name, span in phases.items()}
        for step in timeline.steps:
            self._emit_step(step, contexts[_phase_of(step, timeline)], wall)
        for name, (_, ended_s) in bounds.items():
            phases[name].end(wall.ns(ended_s))
        engine.end(wall.ns(timeline.ended_s))

    def _emit_step(self, step: StepTime, phase: Context, wall: _WallClock) -> None:
        span = self._tracer.start_span(
            "step",
            phase,
            attributes={
                "m3.step.id": step.step_id,
                "m3.step.first_position": step.first_position,
                "m3.step.tokens": step.num_tokens,
                "m3.step.batch_rows": step.batch_rows,
                "m3.step.batch_tokens": step.batch_tokens,
            },
            start_time=wall.ns(step.started_s),
        )
        span.end(wall.ns(step.ended_s))


class _WallClock:
    """Turns time.monotonic() seconds of this process into Unix nanoseconds, as of now."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, monotonic_s: float) -> int:
        return self._offset_ns + int(monotonic_s * 1e9)


def _attributes(timeline: Timeline) -> dict[str, str | int | list[str]]:
    attributes: dict[str, str | int | list[str]] = {
        "gen_ai.usage.input_tokens": timeline.prompt_len,
        "gen_ai.usage.output_tokens": timeline.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": timeline.num_cached_tokens,
        "m3.attempt.id": timeline.request_id,
        "m3.resumed_tokens": timeline.num_resumed_tokens,
        "m3.preemptions": timeline.num_preemptions,
        "m3.steps": len(timeline.steps) + timeline.num_steps_not_recorded,
        "m3.steps_not_recorded": timeline.num_steps_not_recorded,
        "m3.tokens_not_recorded": timeline.num_tokens_not_recorded,
    }
    if timeline.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = [timeline.finish_reason.value]
    return attributes


def _phases(timeline: Timeline) -> dict[str, tuple[float, float]]:
    """Begin and end of each phase that the request came to, in order: they fill the time from arrival to end."""
    begins = {"queue": timeline.arrival_s}
    if timeline.admitted_s is not None:
        # The planning of its first step is part of that step.
        first_step_s = timeline.steps[0].started_s if timeline.steps else timeline.admitted_s
        begins["prefill"] = max(timeline.arrival_s, min(timeline.admitted_s, first_step_s))
    if timeline.first_token_s is not None:
        begins["decode"] = timeline.first_token_s
    ends = [*list(begins.values())[1:], timeline.ended_s]
    return {name: (begin, end) for (name, begin), end in zip(begins.items(), ends, strict=True)}


def _phase_of(step: StepTime, timeline: Timeline) -> str:
    """The step that sampled the first token is the last of the prefill; later ones may begin before it ends."""
    is_prefill = timeline.first_token_s is None or step.ended_s <= timeline.first_token_s
    return "prefill" if is_prefill else "decode"
