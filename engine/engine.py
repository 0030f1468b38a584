"""The engine's step loop: requests in, StepPlans to the executor and their results back, events out.

The life of a request: `add_request` checks it and queues it; a `step` admits it, runs its prompt in chunks,
samples its tokens one a step, and emits one RequestEvent per token; the last event carries the finish reason.

As many steps are in flight as the executor takes: with two, the next one is planned and submitted while the one
before runs, so that the device does not wait for the host. What a request gets does not depend on it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError, EngineDead, RequestError
from engine.guard import IndexGuard
from engine.metrics import EngineStats
from engine.pages import PagePool
from engine.request_check import check_request
from engine.scheduler import RequestState, Scheduler, Step
from engine.step_budget import BudgetLimits
from engine.timeline import StepTime, Timeline
from engine.types import (
    NOT_FINITE,
    NOT_GUIDED,
    NOT_SAMPLED,
    EngineRequest,
    FinishReason,
    Logprobs,
    RequestEvent,
    StepResult,
)

if TYPE_CHECKING:  # at run time it would load torch, which the scheduler's process has no use for
    from engine.executor import Executor

log = logging.getLogger(__name__)

# Steps between per-layer timings. A probed step on a GPU runs operation by operation, which takes as long as several
# captured ones.
CPU_PROBE_INTERVAL = 16
GPU_PROBE_INTERVAL = 2048


class EngineCore:
    """Runs requests on an executor, which it owns and closes. One thread makes all calls.

    Text is not its business: it stops at token ids; stop strings are matched by whoever decodes, and end in
    `abort`.
    """

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self.info = executor.info
        pool_tokens = self.info.num_pages * PAGE_SIZE
        if pool_tokens < self.info.max_model_len:
            executor.close()
            raise ConfigError(
                f"num_pages is {self.info.num_pages}: {pool_tokens} tokens, fewer than one request may have "
                f"(max_model_len, {self.info.max_model_len}); raise num_pages or memory_fraction, "
                "or lower max_model_len"
            )
        self.stats = EngineStats()
        self.pool = PagePool(
            self.info.num_pages,
            enable_prefix_caching=config.enable_prefix_caching,
            namespace=self.info.namespace,
        )
        self.scheduler = Scheduler(
            self.pool,
            self.stats,
            max_num_seqs=config.max_num_seqs,
            limits=BudgetLimits.of(config, self.info.backend),
        )
        default_interval = CPU_PROBE_INTERVAL if self.info.backend == "torch" else GPU_PROBE_INTERVAL
        self._probe_interval = default_interval if config.probe_interval is None else config.probe_interval
        self._audit_interval = config.audit_interval if config.index_reuse == "audited" else 0
        self._guard = IndexGuard.of(config, self.info.plan)
        self._is_audited = config.index_reuse == "audited"
        self._plan: str | None = None
        self._executor = executor
        self._eos_token_ids = frozenset(self.info.eos_token_ids)
        self._requests: dict[str, RequestState] = {}
        self._in_flight: deque[Step] = deque()
        self._last_retired_s = 0.0
        self._events: list[RequestEvent] = []  # made between steps; leave with the next one
        self._num_traced = 0
        self._timelines: list[Timeline] = []
        self._dead: str | None = None

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. RequestError when it can never run; EngineDead when nothing can."""
        self._check_alive()
        self._check_id(request.request_id)
        check_request(request, self.info, has_eos=bool(self._eos_token_ids))
        sampling = request.sampling
        if request.output_token_ids:
            # They came with the first token, which another replica delivered.
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        state = RequestState(
            request_id=request.request_id,
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            prompt_len=len(request.prompt_token_ids),
            sampling=sampling,
            arrival_s=time.monotonic(),
            prompt_logprobs=None if sampling.prompt_logprobs is None else [None],
        )
        if request.trace_parent is not None:
            num_resumed = len(request.output_token_ids)
            state.timeline = Timeline(
                state.request_id, request.trace_parent, state.prompt_len, num_resumed, state.arrival_s
            )
            self._num_traced += 1
        finish_reason = self._finish_reason(state) if request.output_token_ids else None
        if finish_reason is not None:
            # The replica that died had sent the last token, and the word that it was the last got lost.
            self._events.append(self._last_event(state, finish_reason))
            return
        self._requests[state.request_id] = state
        self.scheduler.add(state)

    def _check_id(self, request_id: str) -> None:
        if request_id in self._requests or any(event.request_id == request_id for event in self._events):
            raise RequestError(f"request_id {request_id!r} is in use", param="request_id", code="duplicate_request_id")

    def abort(self, request_id: str) -> None:
        """End a request now and free its pages; the next step's events say so. Ended ones stay as they
        are."""
        state = self._requests.get(request_id)
        if state is None:
            return
        self._end(state)
        self._events.append(self._last_event(state, FinishReason.ABORT))

    def set_plan(self, letters: str) -> None:
        """Run the requests that are added from now on by another index plan; pages of the last one are not found.

        letters: one per layer, legal, and dense where the loaded plan is. Layers are not audited under it.
        ConfigError while requests run, with a guard, or when S layers of the loaded plan own no indexer.
        """
        self._check_alive()
        if not self._is_audited:
            raise ConfigError("set_plan needs index_reuse=audited, got lean: its S layers own no indexer")
        if self._guard is not None:
            raise ConfigError("set_plan and audit_overlap_floor: only one of them can choose the plan")
        if self.has_work():
            raise ConfigError(f"set_plan needs an idle engine, {len(self._requests)} requests run")
        self._plan = letters
        self.pool.set_namespace(f"{self.info.namespace} {letters}")

    @property
    def plan(self) -> str:
        """The letters of the index plan by which requests that are added now run, but for the guard's fallback."""
        return self._plan or self.info.plan

    def take_timelines(self, *, lost: str | None = None) -> list[Timeline]:
        """Of traced requests that ended since the last call. lost: why the others will not end any more; theirs
        come too."""
        if lost is not None:
            for state in self._requests.values():
                self._end_timeline(state, None, lost)
        timelines, self._timelines = self._timelines, []
        return timelines

    def has_work(self) -> bool:
        """Whether `step` has something to run, to collect or to tell."""
        return bool(self._requests or self._in_flight or self._events)

    def step(self) -> list[RequestEvent]:
        """Submit steps until as many are in flight as may be, wait for the oldest and return what it did.

        EngineDead when the executor is gone, for good: unfinished requests then have no last event, and
        belong to whoever resubmits them.
        """
        self._check_alive()
        try:
            while len(self._in_flight) < self._executor.max_in_flight and self._launch():
                pass
            if self._in_flight:
                self._retire()
        except EngineDead as error:
            self._dead = str(error)
            raise
        except Exception as error:
            self._dead = f"the step failed: {error!r}"
            log.exception("the step failed")
            raise EngineDead(self._dead) from error
        self.stats.num_running = len(self.scheduler.running)
        self.stats.num_waiting = len(self.scheduler.waiting)
        self._count_pages()
        assert self._requests or not self.pool.num_held, f"idle, and {self.pool.num_held} pages are held"
        events, self._events = self._events, []
        return events

    def _count_pages(self) -> None:
        stats, pool = self.stats, self.pool
        stats.held_pages, stats.cached_pages = pool.num_held, pool.num_cached
        stats.blank_pages = pool.num_free - pool.num_cached
        stats.kv_usage = stats.held_pages / pool.num_pages
        stats.page_evictions = pool.num_evictions

    def check_books(self) -> None:
        """Prove that the page accounting balances; EngineDead when it does not: a page with two owners would mix
        their contexts. Takes some microseconds per page, so it is for idle moments."""
        self._check_alive()
        try:
            self.pool.check([state.page_ids for state in self.scheduler.running])
        except AssertionError as error:
            self.stats.page_check_failures += 1
            self._dead = f"the page accounting does not balance: {error}"
            raise EngineDead(self._dead) from error

    def close(self) -> None:
        """Free what the executor holds; nothing can be run after that. Safe to call twice."""
        self._dead = self._dead or "the engine is closed"
        self._executor.close()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)

    def _launch(self) -> bool:
        """Plan a step and submit it; whether there was something to plan."""
        started_s = time.monotonic()
        step = self.scheduler.schedule()
        if step is None:
            return False
        step.started_s = started_s
        plan = step.plan
        plan.probe = self._probe_interval > 0 and plan.step_id % self._probe_interval == 0
        plan.audit = self._audit_interval > 0 and plan.step_id % self._audit_interval == 0 and self._plan is None
        plan.fallback = self._guard is not None and self._guard.active
        plan.index_plan = self._plan
        now_s = time.monotonic()
        self.stats.plan_s += now_s - started_s
        for state in step.requests:
            if state.admitted_s is None:
                state.admitted_s = now_s
                self.stats.observations.queue_s.append(now_s - state.arrival_s)
        self._executor.submit(plan)
        self._in_flight.append(step)
        return True

    def _retire(self) -> None:
        """Take the result of the oldest step in flight: new tokens, log-probabilities, ends."""
        result = self._executor.collect()
        step = self._in_flight.popleft()
        _check_result(step, result, self.info.vocab_size)
        if self._num_traced:
            _record(step, time.monotonic())
        for row_index in range(len(step.requests)):
            self._retire_row(step, row_index, result)
        self.stats.add_result(result)
        if self._guard is not None and self._guard.observe(step.plan, result.overlaps):
            self._change_over(self._guard)
        self.stats.steps += 1
        self.stats.decode_tokens += step.plan.num_decode_rows
        self.stats.prefill_tokens += step.plan.num_tokens - step.plan.num_decode_rows
        now_s = time.monotonic()
        # Steps overlap: each counts from where the one before it ended.
        seconds = now_s - max(step.started_s, self._last_retired_s)
        self._last_retired_s = now_s
        self.stats.steps_s += seconds
        self.stats.observations.step_s.append(seconds)
        self.stats.observations.step_tokens.append(step.plan.num_tokens)
        self.stats.observations.batch_size.append(len(step.requests))

    def _change_over(self, guard: IndexGuard) -> None:
        """Steps planned from now on run by another plan. Requests that run go on, on the keys and values they have, and
        leave no pages to others; those admitted from now on find only pages of this plan."""
        self.stats.guard_active, self.stats.guard_trips = guard.active, guard.num_trips
        self.pool.set_namespace(f"{self.info.namespace} {guard.plan}")

    def _retire_row(self, step: Step, row_index: int, result: StepResult) -> None:
        row, state, token_id = step.plan.rows[row_index], step.requests[row_index], result.sampled[row_index]
        end = row.num_computed_tokens + row.num_scheduled_tokens
        self.stats.computed_prompt_tokens += max(0, min(end, state.prompt_len) - row.num_computed_tokens)
        self.scheduler.collected(state, row)
        if state.ended:
            return
        if token_id == NOT_FINITE:
            self._end(state, findable=False)
            self.stats.not_finite += 1
            error = f"the model's logits at position {end - 1} are not finite"
            log.error("request %s: %s", state.request_id, error)
            self._events.append(self._last_event(state, FinishReason.ERROR, error))
            return
        if row.sample:
            state.num_checked_tokens = end
        if token_id == NOT_GUIDED:
            self._end(state)
            self.stats.not_guided += 1
            error = f"the grammar cannot go on at position {end}: {result.guided_errors[row_index]}"
            self._events.append(self._last_event(state, FinishReason.ERROR, error))
            return
        self.scheduler.commit(state, end)
        if state.prompt_logprobs is not None:
            # After a preemption positions run again; what they said the first time stays.
            known = len(state.prompt_logprobs) - 1 - row.num_computed_tokens
            state.prompt_logprobs += result.prompt_logprobs.get(row_index, [])[max(known, 0) :]
        if row.sample:
            self._deliver(state, token_id, result.logprobs.get(row_index))

    def _deliver(self, state: RequestState, token_id: int, logprobs: Logprobs | None) -> None:
        """Append a sampled token, tell it, and end the request when it was the last."""
        event = self._event(state)
        state.token_ids.append(token_id)
        event.token_ids.append(token_id)
        self.stats.generation_tokens += 1
        if state.sampling.logprobs is not None:
            assert logprobs is not None, "no logprobs came back"
            event.logprobs = [logprobs]
        if state.prompt_logprobs is not None:
            assert len(state.prompt_logprobs) == state.prompt_len, "prompt_logprobs came back incomplete"
            event.prompt_logprobs = state.prompt_logprobs
            state.prompt_logprobs = None
            state.sampling = dataclasses.replace(state.sampling, prompt_logprobs=None)
        if state.first_token_s is None:
            state.first_token_s = time.monotonic()
            assert state.admitted_s is not None
            self.stats.observations.prefill_s.append(state.first_token_s - state.admitted_s)
        finish_reason = self._finish_reason(state)
        if finish_reason is not None:
            self._end(state)
            self._finish(event, state, finish_reason)
        self._events.append(event)

    def _finish_reason(self, state: RequestState) -> FinishReason | None:
        """Whether the newest token is the last. Admission saw to it that max_tokens ends it by
        max_model_len."""
        sampling, token_id = state.sampling, state.token_ids[-1]
        if state.num_output_tokens > sampling.min_tokens and (
            (token_id in self._eos_token_ids and not sampling.ignore_eos) or token_id in (sampling.stop_token_ids or ())
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if state.num_output_tokens >= sampling.max_tokens else None

    def _end(self, state: RequestState, *, findable: bool = True) -> None:
        self.scheduler.remove(state, findable=findable)
        del self._requests[state.request_id]

    def _event(self, state: RequestState) -> RequestEvent:
        return RequestEvent(
            request_id=state.request_id,
            index=state.num_output_tokens,
            token_ids=[],
            num_cached_tokens=state.num_cached_tokens or 0,
        )

    def _last_event(self, state: RequestState, finish_reason: FinishReason, error: str | None = None) -> RequestEvent:
        """An event that ends a request without a token."""
        event = self._event(state)
        event.error = error
        self._finish(event, state, finish_reason)
        return event

    def _finish(self, event: RequestEvent, state: RequestState, finish_reason: FinishReason) -> None:
        event.finish_reason = finish_reason
        if finish_reason is FinishReason.STOP:
            event.stop_token_id = state.token_ids[-1]
        self.stats.finished[finish_reason] += 1
        observations = self.stats.observations
        observations.prompt_tokens.append(state.prompt_len)
        observations.generation_tokens.append(state.num_output_tokens)
        if state.first_token_s is not None:
            observations.decode_s.append(time.monotonic() - state.first_token_s)
        self._end_timeline(state, finish_reason, event.error)

    def _end_timeline(self, state: RequestState, finish_reason: FinishReason | None, error: str | None) -> None:
        timeline, state.timeline = state.timeline, None
        if timeline is None:
            return
        timeline.admitted_s, timeline.first_token_s = state.admitted_s, state.first_token_s
        timeline.ended_s = time.monotonic()
        timeline.finish_reason, timeline.error = finish_reason, error
        timeline.num_output_tokens = state.num_output_tokens
        timeline.num_cached_tokens = state.num_cached_tokens or 0
        self._num_traced -= 1
        self._timelines.append(timeline)


def _record(step: Step, ended_s: float) -> None:
    """Enter a collected step into the timelines of its traced requests."""
    plan = step.plan
    batch_rows, batch_tokens = len(plan.rows), plan.num_tokens
    for row, state in zip(plan.rows, step.requests, strict=True):
        if state.timeline is not None:
            state.timeline.add_step(
                StepTime(
                    step_id=plan.step_id,
                    started_s=step.started_s,
                    ended_s=ended_s,
                    first_position=row.num_computed_tokens,
                    num_tokens=row.num_scheduled_tokens,
                    batch_rows=batch_rows,
                    batch_tokens=batch_tokens,
                )
            )


def _check_result(step: Step, result: StepResult, vocab_size: int) -> None:
    """EngineDead when a result does not answer the plan: the ranks and this process disagree on what runs."""
    plan = step.plan
    if result.step_id != plan.step_id or len(result.sampled) != len(plan.rows):
        raise EngineDead(
            f"expected the result of step {plan.step_id} with {len(plan.rows)} rows, "
            f"got step {result.step_id} with {len(result.sampled)} rows"
        )
    for row_index, (row, token_id) in enumerate(zip(plan.rows, result.sampled, strict=True)):
        is_refused = token_id == NOT_FINITE or (token_id == NOT_GUIDED and row_index in result.guided_errors)
        expected = is_refused or (0 <= token_id < vocab_size if row.sample else token_id == NOT_SAMPLED)
        if not expected:
            raise EngineDead(f"step {plan.step_id} answers {row} with token {token_id}")
