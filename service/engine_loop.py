"""The scheduler thread of an engine replica: the only one that calls EngineCore.

It never touches sockets or the event loop; commands come in through a queue, outcomes leave through callbacks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.engine import EngineCore
from engine.errors import EngineDead, RequestError
from engine.metrics import EngineStats
from engine.timeline import Timeline
from engine.types import EngineRequest, RequestEvent
from service.messages import Refusal, full_queue

log = logging.getLogger(__name__)

# An idle thread wakes this often to see whether its worker group still lives.
IDLE_CHECK_S = 1.0
# The page accounting is checked at most this often, when the thread has been idle for IDLE_CHECK_S: with 100,000 pages
# it takes half a second.
BOOKS_PERIOD_S = 60.0
# Slack of the health check beyond the step deadline, which the executor enforces itself.
HEALTH_SLACK_S = 5.0
JOIN_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class EngineLoopCallbacks:
    """Called on the scheduler thread.

    outcome: the events of one step, and requests refused since the last one.
    stats: after each step.  death: once, with the cause, when the worker group is lost.
    timelines: of traced requests that ended; None when nothing is traced.
    """

    outcome: Callable[[list[RequestEvent], list[Refusal]], None]
    stats: Callable[[EngineStats], None]
    death: Callable[[str], None]
    timelines: Callable[[list[Timeline]], None] | None = None


class EngineLoop:
    """Runs an EngineCore until it is closed or its worker group dies.

    check_alive: raises EngineDead when the worker group is gone, also between steps.
    max_live_requests: more than that are refused as Overloaded.
    """

    def __init__(
        self,
        core: EngineCore,
        callbacks: EngineLoopCallbacks,
        *,
        check_alive: Callable[[], None],
        max_live_requests: int,
        step_timeout_s: float,
    ) -> None:
        self._core = core
        self._callbacks = callbacks
        self._check_alive = check_alive
        self._max_live_requests = max_live_requests
        self._progress_limit_s = step_timeout_s + HEALTH_SLACK_S
        self._commands: deque[list[EngineRequest] | list[str]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._dead: str | None = None
        self._has_worked = False
        self._checked_at_s = -BOOKS_PERIOD_S
        self._live: set[str] = set()
        self._live_lock = threading.Lock()
        self._progress_at_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="m3-scheduler", daemon=True)
        self._thread.start()

    def add(self, requests: list[EngineRequest]) -> list[Refusal]:
        """Hand requests to the engine, as many as the queue takes; the refusals of the others, at once: a step may take
        a second. What the engine refuses comes with the next outcome. Any thread."""
        admitted: list[EngineRequest] = []
        refusals: list[Refusal] = []
        with self._live_lock:
            for request in requests:
                if len(self._live) >= self._max_live_requests and not request.resubmitted:
                    refusals.append(self._full(request))
                else:
                    self._live.add(request.request_id)
                    admitted.append(request)
        if admitted:
            self._commands.append(admitted)
            self._wake.set()
        return refusals

    def abort(self, request_ids: list[str]) -> None:
        """End requests before the next step. Any thread."""
        self._commands.append(request_ids)
        self._wake.set()

    def check_health(self) -> None:
        """Raise EngineDead when the group is lost or the thread is stuck. O(1), any thread."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        silent_s = time.monotonic() - self._progress_at_s
        if silent_s > self._progress_limit_s:
            raise EngineDead(f"no engine step for {silent_s:.0f} s, limit {self._progress_limit_s:g} s")

    def close(self, *, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Stop the thread and the worker group, or stop waiting for that. Safe to call twice."""
        self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except EngineDead as error:
            self._die(str(error))
        except Exception as error:
            # A bug here must not leave requests waiting for ever.
            log.exception("the scheduler thread failed")
            self._die(f"the scheduler thread failed: {error!r}")
        finally:
            if self._callbacks.timelines is not None:
                self._callbacks.timelines(self._core.take_timelines(lost=self._dead or "the replica stopped"))
            self._core.close()

    def _die(self, cause: str) -> None:
        self._dead = cause
        self._callbacks.death(cause)

    def _turn(self) -> None:
        self._progress_at_s = time.monotonic()
        self._wake.clear()
        refusals = self._take_commands()
        if self._core.has_work():
            self._has_worked = True
            events = self._core.step()
            self._ended([event.request_id for event in events if event.finish_reason is not None])
            self._callbacks.outcome(events, refusals)
            self._callbacks.stats(self._core.stats)
            if self._callbacks.timelines is not None and (timelines := self._core.take_timelines()):
                self._callbacks.timelines(timelines)
            return
        if refusals:
            self._callbacks.outcome([], refusals)
        self._check_alive()
        if not self._wake.wait(IDLE_CHECK_S) and self._has_worked:
            self._check_books()

    def _check_books(self) -> None:
        now_s = time.monotonic()
        if now_s - self._checked_at_s >= BOOKS_PERIOD_S:
            self._core.check_books()
            self._has_worked, self._checked_at_s = False, now_s

    def _take_commands(self) -> list[Refusal]:
        refusals: list[Refusal] = []
        while self._commands:
            for item in self._commands.popleft():
                if isinstance(item, str):
                    self._core.abort(item)
                elif (refusal := self._admit(item)) is not None:
                    refusals.append(refusal)
        return refusals

    def _admit(self, request: EngineRequest) -> Refusal | None:
        try:
            self._core.add_request(request)
        except RequestError as error:
            self._ended([request.request_id])
            return Refusal(request.request_id, error.message, error.param, error.code)
        return None

    def _ended(self, request_ids: list[str]) -> None:
        with self._live_lock:
            self._live.difference_update(request_ids)

    def _full(self, request: EngineRequest) -> Refusal:
        error = full_queue(len(self._live), self._max_live_requests)
        return Refusal(request.request_id, str(error), code="queue_full", retry_after_s=error.retry_after_s)
