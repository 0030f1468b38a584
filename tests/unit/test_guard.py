"""The audit's guard: when it trips and recovers, and what a change-over means for requests and their pages."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest

from engine.config import PAGE_SIZE, EngineConfig
from engine.engine import EngineCore
from engine.guard import IndexGuard, fallback_plan, mean_overlap
from engine.types import LayerOverlap, StepPlan, StepResult
from tests.unit.worker_model import CheckingExecutor, Received, expected, finish, make_request, run, same, step

PLAN = "DFSSFS"
PAIRS = 8


def make_guard(*, trip_after: int = 2, recover_after: int = 3) -> IndexGuard:
    return IndexGuard(PLAN, "DFFFFF", floor=0.5, margin=0.25, trip_after=trip_after, recover_after=recover_after)


def overlaps(mean: float | None) -> list[LayerOverlap]:
    """Two layers, of which one has three times as many pairs; None: nobody had a choice."""
    if mean is None:
        return []
    return [LayerOverlap(2, (mean - 0.03) * PAIRS, PAIRS), LayerOverlap(3, (mean + 0.01) * 3 * PAIRS, 3 * PAIRS)]


class Drive:
    """Steps in the state that the guard asks for, audited unless told otherwise."""

    def __init__(self, guard: IndexGuard) -> None:
        self.guard, self.step_id = guard, 0

    def __call__(self, *means: float | None) -> list[bool]:
        """Whether the plan changed after each of these audits."""
        return [self.one(mean) for mean in means]

    def one(self, mean: float | None, *, audit: bool = True, fallback: bool | None = None) -> bool:
        self.step_id += 1
        fallback = self.guard.active if fallback is None else fallback
        return self.guard.observe(StepPlan(self.step_id, [], 0, audit=audit, fallback=fallback), overlaps(mean))


def test_the_mean_is_over_pairs() -> None:
    assert mean_overlap(overlaps(0.6)) == pytest.approx(0.6)
    assert mean_overlap([]) is None


def test_it_trips_after_enough_audits_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    guard = make_guard()
    audits = Drive(guard)
    with caplog.at_level(logging.WARNING, "engine.guard"):
        assert audits(0.49, 0.5, 0.49) == [False, False, False] and guard.plan == PLAN
        assert not caplog.records
        assert audits(0.25) == [True]
    assert guard.active and guard.num_trips == 1 and guard.plan == "DFFFFF"
    [record] = caplog.records
    assert record.getMessage() == (
        "index guard tripped at step 4: overlap 0.490, 0.250, below audit_overlap_floor=0.5 in 2 audits in a row; "
        "every sparse layer selects for itself now: plan DFFFFF in place of DFSSFS"
    )


def test_it_recovers_above_the_margin_only(caplog: pytest.LogCaptureFixture) -> None:
    guard = make_guard()
    audits = Drive(guard)
    audits(0.1, 0.1)
    assert guard.active
    # Above the floor is not enough, and one audit that is below begins the row anew.
    assert not any(audits(0.74, 0.74, 0.74, 0.74, 0.76, 0.76, 0.74, 0.76, 0.76))
    with caplog.at_level(logging.WARNING, "engine.guard"):
        assert audits(0.9) == [True]
    assert not guard.active and guard.plan == PLAN and guard.num_trips == 1
    assert "recovered at step 12: overlap 0.760, 0.760, 0.900, at or above 0.75" in caplog.text
    assert audits(0.1, 0.1) == [False, True] and guard.num_trips == 2


def test_steps_without_a_choice_do_not_trip_it_and_let_it_recover() -> None:
    guard = make_guard()
    audits = Drive(guard)
    assert not any(audits(None, None, 0.1, None, None))
    assert audits(0.1) == [True]
    assert audits(0.8, None, None) == [False, False, True]


def test_only_audits_of_its_own_state_count() -> None:
    guard = make_guard(trip_after=1, recover_after=1)
    audits = Drive(guard)
    assert not audits.one(0.1, audit=False)
    assert audits.one(0.1)
    # Planned before the change-over, collected after it.
    assert not audits.one(1.0, fallback=False)
    assert not audits.one(1.0, audit=False)
    assert audits.one(1.0)
    assert not audits.one(0.1, fallback=True)


def test_off_unless_asked_for_and_something_reuses() -> None:
    assert IndexGuard.of(EngineConfig("m", index_reuse="audited"), PLAN) is None
    on = EngineConfig("m", index_reuse="audited", audit_overlap_floor=0.5)
    assert IndexGuard.of(on, "DFFF") is None and fallback_plan(on, "DFFF") is None
    guard = IndexGuard.of(on, PLAN)
    assert guard is not None and guard.plan == PLAN and fallback_plan(on, PLAN) == "DFFFFF"


# --- in the engine ----------------------------------------------------------------------------------------------


class AuditingExecutor(CheckingExecutor):
    """Reports of every audited step the overlap that `mean` gives for its id; checks that whoever enters finds only
    pages that were written wholly in the state in which it enters."""

    def __init__(self, config: EngineConfig, max_in_flight: int, mean: Callable[[int], float | None]) -> None:
        super().__init__(config, 8, max_in_flight)
        self._mean = mean
        self._states: dict[int, set[bool]] = {}  # of each page: in which states it was written

    def submit(self, plan: StepPlan) -> None:
        entering = {new.slot for new in plan.new}
        for row in plan.rows:
            if row.slot in entering:
                for page_id in row.new_page_ids[: row.num_computed_tokens // PAGE_SIZE]:
                    assert self._states[page_id] == {plan.fallback}
        super().submit(plan)
        for row in plan.rows:
            start, end = row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens
            for index in range(start // PAGE_SIZE, -(-end // PAGE_SIZE)):
                states = self._states.setdefault(self._slots[row.slot].block_table[index], set())
                if index * PAGE_SIZE >= start:
                    states.clear()
                states.add(plan.fallback)

    def collect(self) -> StepResult:
        result = super().collect()
        if self.plans[result.step_id - 1].audit:
            result.overlaps = overlaps(self._mean(result.step_id))
        return result


def make_core(
    mean: Callable[[int], float | None], *, max_in_flight: int = 1, **settings: object
) -> tuple[EngineCore, AuditingExecutor]:
    defaults: dict[str, object] = {
        "index_reuse": "audited",
        "audit_overlap_floor": 0.5,
        "audit_interval": 1,
        "audit_trip_after": 2,
        "audit_recover_after": 2,
        "probe_interval": 0,
        "max_num_batched_tokens": 96,
    }
    config = EngineConfig.from_kwargs("model", **{**defaults, **settings})
    executor = AuditingExecutor(config, max_in_flight, mean)
    return EngineCore(config, executor), executor


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_decision_leaves_with_the_next_plan(max_in_flight: int) -> None:
    core, executor = make_core(lambda step_id: 0.2 if 4 <= step_id < 10 else 0.9, max_in_flight=max_in_flight)
    run(core, make_request("r", 10, max_tokens=20, ignore_eos=True))
    fallback = [plan.step_id for plan in executor.plans if plan.fallback]
    # The audit of step 5 is the second that is low. Steps that were in flight by then run as they were planned, and
    # those do not count towards recovery: from step 10 on two good ones are needed.
    late = max_in_flight - 1
    assert fallback == list(range(6 + late, 12 + late))
    assert core.stats.guard_trips == 1 and not core.stats.guard_active


def test_pages_of_the_other_state_are_not_found() -> None:
    """Equal prompts, one behind the other: the cache is of use until the guard trips, and again behind it."""
    low = False
    core, executor = make_core(lambda step_id: 0.2 if low else 0.9, audit_recover_after=1)
    prompt = [7] * 300

    def cached(name: str) -> int:
        request = make_request(name, prompt, max_tokens=4, ignore_eos=True)
        answer = run(core, request)[name]
        assert same(answer, expected(request))
        return answer.num_cached_tokens

    assert [cached("a"), cached("b")] == [0, 256]
    low = True
    # Trips while it runs: what it leaves is of both states.
    assert cached("c") == 256 and core.stats.guard_active
    assert [cached("d"), cached("e")] == [0, 256]
    low = False
    assert cached("f") == 256 and not core.stats.guard_active
    assert [cached("g"), cached("h")] == [0, 256]
    assert core.pool.num_cached == 2
    assert len({plan.fallback for plan in executor.plans}) == 2


@pytest.mark.parametrize("seed", range(6))
def test_change_overs_lose_nothing_whatever_runs(seed: int) -> None:
    """Random traffic on few pages, preemptions included; the guard changes over again and again."""
    rng = random.Random(seed)
    core, _ = make_core(
        lambda step_id: rng.choice([0.1, 0.1, 0.1, 0.9, 0.9, None]),
        max_in_flight=1 + seed % 2,
        audit_interval=16 + seed % 3,
        max_num_seqs=4,
    )
    requests = [
        make_request(f"r{i}", [5] * rng.randint(1, 200), max_tokens=rng.randint(100, 300), seed=i % 3, ignore_eos=True)
        for i in range(30)
    ]
    answers: dict[str, Received] = {}
    for request in requests:
        core.add_request(request)
        for _ in range(rng.randint(0, 12)):
            step(core, answers)
    finish(core, answers)
    assert all(same(answers[each.request_id], expected(each)) for each in requests)
    assert core.stats.guard_trips > 3 and core.stats.preemptions and core.stats.prefix_hits_tokens
