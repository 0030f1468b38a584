"""Timelines of traced requests: every step they were in, at its time, up to a bound; nothing of the others."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from engine.errors import EngineDead
from engine.timeline import MAX_PREEMPTIONS, MAX_STEPS, StepTime, Timeline
from engine.types import EngineRequest, FinishReason
from tests.unit.worker_model import (
    POISON_SEED,
    CheckingExecutor,
    Received,
    expected,
    finish,
    make_core,
    make_request,
    run,
    step,
    step_until_preemption,
)


def traced(request: EngineRequest) -> EngineRequest:
    return dataclasses.replace(request, trace_parent=f"of {request.request_id}")


def check(timeline: Timeline, executor: CheckingExecutor) -> None:
    """Times are in order, and each step is one that the executor got, with such a row in it."""
    marks = [timeline.arrival_s, timeline.admitted_s, timeline.first_token_s, timeline.ended_s]
    there = [mark for mark in marks if mark is not None]
    assert there == sorted(there)
    assert timeline.trace_parent == f"of {timeline.request_id}"
    plans = {plan.step_id: plan for plan in executor.plans}
    for entry in timeline.steps:
        plan = plans[entry.step_id]
        assert (entry.batch_rows, entry.batch_tokens) == (len(plan.rows), plan.num_tokens)
        assert (entry.first_position, entry.num_tokens) in {
            (row.num_computed_tokens, row.num_scheduled_tokens) for row in plan.rows
        }
        assert timeline.arrival_s <= entry.started_s <= entry.ended_s <= timeline.ended_s
    for one, next_ in itertools.pairwise(timeline.steps):
        assert one.step_id < next_.step_id and one.ended_s <= next_.ended_s


def test_prompt_chunks_and_output_tokens_are_each_a_step() -> None:
    core, executor = make_core(max_num_batched_tokens=128)
    request = traced(make_request("r", 300, max_tokens=5, ignore_eos=True))
    run(core, request, make_request("untraced", 10, max_tokens=50, ignore_eos=True))
    [timeline] = core.take_timelines()
    check(timeline, executor)
    assert (timeline.prompt_len, timeline.num_output_tokens, timeline.num_resumed_tokens) == (300, 5, 0)
    assert (timeline.finish_reason, timeline.error) == (FinishReason.LENGTH, None)
    assert sum(entry.num_tokens for entry in timeline.steps) == 300 + 5 - 1
    positions = [(entry.first_position, entry.first_position + entry.num_tokens) for entry in timeline.steps]
    assert positions[0][0] == 0 and all(one[1] == next_[0] for one, next_ in itertools.pairwise(positions))
    # The step that sampled the first token had ended when that token was delivered, and no later one had.
    assert timeline.first_token_s is not None
    ended = [entry for entry in timeline.steps if entry.ended_s <= timeline.first_token_s]
    assert sum(entry.num_tokens for entry in ended) == 300
    assert core.take_timelines() == []


def test_steps_in_flight_overlap() -> None:
    core, executor = make_core(max_in_flight=2)
    run(core, traced(make_request("r", 20, max_tokens=6, ignore_eos=True)))
    [timeline] = core.take_timelines()
    check(timeline, executor)
    assert len(timeline.steps) == 6
    assert all(next_.started_s <= one.ended_s for one, next_ in itertools.pairwise(timeline.steps[1:]))


def test_the_cache_is_accounted_for() -> None:
    core, executor = make_core()
    run(core, make_request("first", 300, max_tokens=2, ignore_eos=True))
    run(core, traced(make_request("second", 300, max_tokens=2, ignore_eos=True)))
    [timeline] = core.take_timelines()
    check(timeline, executor)
    assert timeline.num_cached_tokens == timeline.steps[0].first_position == 256


def test_a_preempted_request_says_when_and_runs_again() -> None:
    core, executor = make_core(num_pages=5, enable_prefix_caching=False)
    answers: dict[str, Received] = {}
    for name in ("old", "young"):
        core.add_request(traced(make_request(name, 250, max_tokens=30, ignore_eos=True)))
    step_until_preemption(core, answers)
    finish(core, answers)
    timelines = {timeline.request_id: timeline for timeline in core.take_timelines()}
    for timeline in timelines.values():
        check(timeline, executor)
    young = timelines["young"]
    assert timelines["old"].preempted_s == []
    assert young.num_preemptions == len(young.preempted_s) == core.stats.preemptions >= 1
    assert young.arrival_s < young.preempted_s[0] < young.ended_s
    assert [entry.first_position for entry in young.steps].count(0) == 1 + young.num_preemptions


def test_the_number_of_entries_is_bounded() -> None:
    core, executor = make_core()
    run(core, traced(make_request("r", 100, max_tokens=MAX_STEPS + 40, ignore_eos=True)))
    [timeline] = core.take_timelines()
    check(timeline, executor)
    assert len(timeline.steps) == MAX_STEPS
    assert timeline.num_steps_not_recorded == timeline.num_tokens_not_recorded == 40
    for _ in range(MAX_PREEMPTIONS + 5):
        timeline.preempt()
    assert (len(timeline.preempted_s), timeline.num_preemptions) == (MAX_PREEMPTIONS, MAX_PREEMPTIONS + 5)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_aborts_and_failures_end_a_timeline_once(max_in_flight: int) -> None:
    core, executor = make_core(max_in_flight=max_in_flight)
    answers: dict[str, Received] = {}
    for request in (
        make_request("bad", 20, max_tokens=9, seed=POISON_SEED, min_tokens=9),
        make_request("aborted", 20, max_tokens=99, ignore_eos=True),
    ):
        core.add_request(traced(request))
    for _ in range(4):
        step(core, answers)
    core.abort("aborted")
    core.add_request(traced(make_request("never", 20, max_tokens=99)))
    core.abort("never")
    finish(core, answers)
    timelines = {timeline.request_id: timeline for timeline in core.take_timelines()}
    assert timelines.keys() == {"bad", "aborted", "never"}
    for timeline in timelines.values():
        check(timeline, executor)
    assert timelines["bad"].finish_reason is FinishReason.ERROR and timelines["bad"].error is not None
    assert "not finite" in timelines["bad"].error
    assert timelines["aborted"].finish_reason is FinishReason.ABORT and timelines["aborted"].error is None
    assert timelines["never"].admitted_s is None and timelines["never"].steps == []


def test_a_resumed_request_counts_what_it_came_with() -> None:
    core, executor = make_core()
    request = make_request("r", 200, max_tokens=9, ignore_eos=True)
    token_ids = expected(request).token_ids
    core.add_request(dataclasses.replace(traced(request), output_token_ids=token_ids[:4]))
    finish(core, {"r": Received(token_ids[:4])})
    [timeline] = core.take_timelines()
    check(timeline, executor)
    assert (timeline.num_resumed_tokens, timeline.num_output_tokens) == (4, 9)
    assert sum(entry.num_tokens for entry in timeline.steps) == 200 + 9 - 1
    # The replica that died had sent everything but the word that it was the last.
    core.add_request(dataclasses.replace(traced(request), output_token_ids=token_ids))
    finish(core, {"r": Received(token_ids)})
    [timeline] = core.take_timelines()
    check(timeline, executor)
    assert timeline.finish_reason is FinishReason.LENGTH and timeline.steps == []


def test_what_a_lost_engine_leaves_behind() -> None:
    core, executor = make_core()
    for name in ("one", "two"):
        core.add_request(traced(make_request(name, 20, max_tokens=20, ignore_eos=True)))
    core.add_request(make_request("untraced", 20, max_tokens=20, ignore_eos=True))
    executor.die_at_step = 5
    with pytest.raises(EngineDead):
        while True:
            core.step()
    assert core.take_timelines() == []
    lost = core.take_timelines(lost="killed")
    assert [timeline.request_id for timeline in lost] == ["one", "two"]
    for timeline in lost:
        check(timeline, executor)
        assert (timeline.finish_reason, timeline.error, len(timeline.steps)) == (None, "killed", 4)
    assert core.take_timelines(lost="killed") == []


def test_untraced_requests_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("a step was recorded for nobody")

    monkeypatch.setattr(Timeline, "add_step", never)
    monkeypatch.setattr(StepTime, "__new__", never)
    core, _ = make_core()
    run(core, make_request("r", 20, max_tokens=5, ignore_eos=True))
    assert core.take_timelines() == []
