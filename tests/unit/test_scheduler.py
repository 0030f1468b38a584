"""The scheduler: which plans it makes, and that no plan, pool or batch changes what a request gets."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.errors import EngineDead
from engine.types import EngineRequest, FinishReason, SamplingParams
from tests.unit.worker_model import (
    MAX_MODEL_LEN,
    POISON_SEED,
    POISON_TOKEN_ID,
    UNMASKED_SEED,
    Received,
    check_books,
    expected,
    finish,
    make_core,
    make_request,
    run,
    same,
    step,
    step_until_preemption,
)


@st.composite
def request_lists(draw: st.DrawFn) -> list[EngineRequest]:
    """Requests whose prompts often share their first pages with those of others, and often outgrow the pool."""
    requests = []
    for index in range(draw(st.integers(1, 7))):
        length = draw(st.sampled_from([1, 5, 127, 128, 129, 200, 256, 257, 300, 361]))
        shared = min(draw(st.sampled_from([0, 128, 200, 256, 361])), length)
        own = draw(st.integers(0, 2))
        prompt = [(p * 7 + (own if p >= shared else 0)) % POISON_TOKEN_ID for p in range(length)]
        if (poisoned := draw(st.sampled_from([None, None, None, 0, 130]))) is not None and poisoned < length:
            prompt[poisoned] = POISON_TOKEN_ID
        max_tokens = min(draw(st.sampled_from([1, 2, 20, 150, 300])), MAX_MODEL_LEN - length)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(draw(st.sampled_from([0, 0, 5, 60])), max_tokens),
            ignore_eos=draw(st.sampled_from([True, True, False])),
            seed=draw(st.sampled_from([1, UNMASKED_SEED, -5, 2**63 - 1, POISON_SEED])),
            stop_token_ids=draw(st.sampled_from([None, None, [7]])),
            logprobs=draw(st.sampled_from([None, 0])),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        )
        requests.append(EngineRequest(f"r{index}", prompt, sampling))
    return requests


LIMITS = st.fixed_dictionaries(
    {
        "num_pages": st.sampled_from([4, 5, 6, 8, 24]),
        "max_num_batched_tokens": st.sampled_from([9, 64, 128, 257, 2048]),
        "max_num_prefill_tokens": st.sampled_from([None, 1, 8, 100]),
        "long_prefill_token_threshold": st.sampled_from([None, 0, 1, 128, 300]),
        "max_num_seqs": st.sampled_from([1, 2, 3, 8]),
        "enable_prefix_caching": st.booleans(),
    }
)
TIGHT = {"num_pages": 4, "max_num_batched_tokens": 257, "max_num_seqs": 8, "enable_prefix_caching": True}
GROWING = [make_request(f"r{i}", 100 + i, max_tokens=300, ignore_eos=True, prompt_logprobs=0) for i in range(5)]
# How many steps the executor takes before the first is collected. What a request gets is the same.
DEPTHS = pytest.mark.parametrize("max_in_flight", [1, 2, 3])
FAST = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@DEPTHS
@FAST
@given(requests=request_lists(), limits=LIMITS, arrivals=st.lists(st.integers(0, 12), min_size=7, max_size=7))
@example(requests=GROWING, limits=TIGHT, arrivals=[0] * 7)
def test_tokens_depend_on_the_request_alone(
    requests: list[EngineRequest], limits: dict[str, int], arrivals: list[int], max_in_flight: int
) -> None:
    """Whatever the pool, the budget, the batch and the order: every request ends once, with its own tokens."""
    core, executor = make_core(**limits, max_in_flight=max_in_flight)
    answers: dict[str, Received] = {}
    for request, num_steps in zip(requests, arrivals, strict=False):
        for _ in range(num_steps):
            step(core, answers)
        core.add_request(request)
    finish(core, answers)
    for request in requests:
        assert same(answers[request.request_id], expected(request))
    assert core.stats.generation_tokens == sum(len(answer.token_ids) for answer in answers.values())
    assert not executor.num_in_flight and (max_in_flight > 1 or not executor.num_rows_ahead)


@DEPTHS
@FAST
@given(requests=request_lists(), limits=LIMITS, data=st.data())
def test_abort_anywhere(
    requests: list[EngineRequest], limits: dict[str, int], data: st.DataObject, max_in_flight: int
) -> None:
    """An abort frees the pages at once and ends one request, once; the others do not notice."""
    core, _ = make_core(**limits, max_in_flight=max_in_flight)
    answers: dict[str, Received] = {}
    victims = data.draw(st.lists(st.sampled_from(requests), min_size=1, unique_by=lambda r: r.request_id))
    for request in requests:
        core.add_request(request)
    for victim in victims:
        for _ in range(data.draw(st.integers(0, 40))):
            step(core, answers)
        core.abort(victim.request_id)
        core.abort(victim.request_id)
        check_books(core)
        assert all(state.request_id != victim.request_id for state in core.scheduler)
    finish(core, answers)
    for request in requests:
        answer, reference = answers[request.request_id], expected(request)
        if answer.finish_reason is FinishReason.ABORT:
            assert request in victims
            assert answer.token_ids == reference.token_ids[: len(answer.token_ids)]
        else:
            assert same(answer, reference)


@DEPTHS
@FAST
@given(requests=request_lists(), limits=LIMITS, other=LIMITS, num_steps=st.integers(1, 120))
def test_another_engine_continues_with_the_same_tokens(
    requests: list[EngineRequest], limits: dict[str, int], other: dict[str, int], num_steps: int, max_in_flight: int
) -> None:
    """An engine dies; what it had delivered goes to another as output tokens; the client sees one answer."""
    core, executor = make_core(**limits, max_in_flight=max_in_flight)
    executor.die_at_step = num_steps
    answers = {request.request_id: Received() for request in requests}
    for request in requests:
        core.add_request(request)
    try:
        finish(core, answers)
    except EngineDead:
        with pytest.raises(EngineDead):
            core.step()
    heir, _ = make_core(**other, max_in_flight=max_in_flight)
    for request in requests:
        if answers[request.request_id].finish_reason is None:
            delivered = list(answers[request.request_id].token_ids)
            heir.add_request(dataclasses.replace(request, output_token_ids=delivered))
    finish(heir, answers)
    for request in requests:
        assert same(answers[request.request_id], expected(request))


@DEPTHS
def test_pages_run_out_the_youngest_are_preempted_and_still_finish(max_in_flight: int) -> None:
    core, executor = make_core(max_in_flight=max_in_flight, **TIGHT)
    answers = run(core, *GROWING)
    assert core.stats.preemptions > 0
    assert all(same(answers[request.request_id], expected(request)) for request in GROWING)
    order = list(answers)
    assert order == sorted(order), "first come, first served"
    assert sum(len(plan.new) for plan in executor.plans) == len(GROWING) + core.stats.preemptions


@DEPTHS
def test_preemption_takes_the_youngest_and_puts_it_first_in_the_queue(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight, num_pages=6, max_num_seqs=4)
    for index in range(3):
        core.add_request(make_request(f"r{index}", 127, max_tokens=200, ignore_eos=True, seed=index))
    core.add_request(make_request("late", 300, max_tokens=10))
    answers: dict[str, Received] = {}
    step_until_preemption(core, answers)
    assert [state.request_id for state in core.scheduler.running] == ["r0", "r1"]
    assert [state.request_id for state in core.scheduler.waiting] == ["r2", "late"]
    assert core.scheduler.waiting[0].num_output_tokens > 0
    finish(core, answers)


def test_prompt_is_chunked_beside_decodes() -> None:
    core, executor = make_core(max_num_batched_tokens=100)
    core.add_request(make_request("short", 10, max_tokens=20, ignore_eos=True))
    step(core, {})
    core.add_request(make_request("long", 250, max_tokens=2, ignore_eos=True))
    finish(core, {"short": Received([0])})
    shapes = [[row.num_scheduled_tokens for row in plan.rows] for plan in executor.plans[1:4]]
    assert shapes == [[1, 99], [1, 99], [1, 52]]
    assert [plan.num_decode_rows for plan in executor.plans[1:5]] == [1, 1, 1, 2]


def test_one_output_token_in_the_middle_is_no_decode_row() -> None:
    core, executor = make_core(max_num_batched_tokens=1)
    request = make_request("r", 10, max_tokens=9, ignore_eos=True)
    core.add_request(dataclasses.replace(request, output_token_ids=expected(request).token_ids[:7]))
    finish(core, {"r": Received([0] * 7)})
    assert [plan.num_decode_rows for plan in executor.plans] == [0] * 16 + [1, 1]


def test_prefix_hit_leaves_one_token_to_run_and_is_reported() -> None:
    core, executor = make_core()
    prompts = [make_request(f"r{i}", 256, max_tokens=3, ignore_eos=True) for i in range(3)]
    assert run(core, prompts[0])["r0"].num_cached_tokens == 0
    assert run(core, prompts[1])["r1"].num_cached_tokens == 128
    row = executor.plans[3].rows[0]
    assert (row.num_computed_tokens, row.num_scheduled_tokens, len(row.new_page_ids)) == (128, 128, 2)
    assert run(core, make_request("longer", 257, max_tokens=3))["longer"].num_cached_tokens == 256
    assert (core.stats.prefix_queries_tokens, core.stats.prefix_hits_tokens) == (256 + 256 + 257, 128 + 256)


def test_pages_are_found_only_after_their_step() -> None:
    core, executor = make_core()
    run(core, make_request("r0", 300, max_tokens=3), make_request("r1", 300, max_tokens=3))
    assert [row.num_computed_tokens for row in executor.plans[0].rows] == [0, 0]


@DEPTHS
def test_prompt_logprobs_need_every_position_computed(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight)
    run(core, make_request("r0", 300, max_tokens=2))
    request = make_request("r1", 300, max_tokens=2, prompt_logprobs=0)
    answer = run(core, request)["r1"]
    assert same(answer, expected(request)) and answer.num_cached_tokens == 0


def test_prompt_logprobs_survive_preemption_half_way() -> None:
    core, executor = make_core(num_pages=4, max_num_batched_tokens=2)
    old = make_request("old", 120, max_tokens=200, ignore_eos=True)
    young = make_request("young", [8] * 200, max_tokens=4, ignore_eos=True, prompt_logprobs=0)
    answers: dict[str, Received] = {}
    core.add_request(old)
    for _ in range(61):
        step(core, answers)
    assert executor.plans[-1].num_decode_rows == 1
    core.add_request(young)
    step_until_preemption(core, answers)
    [state] = core.scheduler.waiting
    assert state.prompt_logprobs is not None and 128 < len(state.prompt_logprobs) < 200
    finish(core, answers)
    assert all(same(answers[request.request_id], expected(request)) for request in (old, young))
    assert answers["young"].num_cached_tokens == 0, "what preemption found again counts as cached"
    # It re-enters on the page whose log-probabilities are all there.
    again = [row for plan in executor.plans for row in plan.rows if plan.new and row.slot == plan.new[0].slot]
    assert [row.num_computed_tokens for row in again] == [0, 0, 128]


@DEPTHS
def test_new_namespace_hides_the_pages_of_before_and_of_running_requests(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight)
    run(core, make_request("a", 300, max_tokens=1))
    core.add_request(make_request("b", 300, max_tokens=130, ignore_eos=True))
    answers: dict[str, Received] = {}
    step(core, answers)
    core.pool.set_namespace("other plan")
    finish(core, answers)
    assert answers["b"].num_cached_tokens == 256
    assert run(core, make_request("c", 300, max_tokens=1))["c"].num_cached_tokens == 0
    assert run(core, make_request("d", 300, max_tokens=1))["d"].num_cached_tokens == 256


@DEPTHS
def test_page_under_two_namespaces_is_never_found(max_in_flight: int) -> None:
    """Also when the first namespace is back before the page is full."""
    core, _ = make_core(max_in_flight=max_in_flight)
    mixed = make_request("mixed", 300, max_tokens=130, ignore_eos=True)
    core.add_request(mixed)
    answers: dict[str, Received] = {}
    step(core, answers)
    core.pool.set_namespace("other plan")
    step(core, answers)
    core.pool.set_namespace("namespace")
    finish(core, answers)
    run(core, make_request("pure", 300, max_tokens=1))
    whole = mixed.prompt_token_ids + answers["mixed"].token_ids
    assert run(core, make_request("whole", whole, max_tokens=1))["whole"].num_cached_tokens == 256


@DEPTHS
def test_preempted_request_takes_up_the_namespace_it_re_enters_in(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight, num_pages=6)
    core.add_request(make_request("old", 130, max_tokens=300, ignore_eos=True))
    core.add_request(make_request("young", [8] * 130, max_tokens=300, ignore_eos=True))
    answers: dict[str, Received] = {}
    step_until_preemption(core, answers)
    core.pool.set_namespace("other plan")
    finish(core, answers)
    assert run(core, make_request("again", [8] * 130, max_tokens=1))["again"].num_cached_tokens == 128


@DEPTHS
def test_half_computed_page_of_an_aborted_request_is_not_found(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight, max_num_batched_tokens=200)
    core.add_request(make_request("gone", 300))
    step(core, {})
    core.abort("gone")
    answers = finish(core, {})
    core.add_request(make_request("next", 300))
    assert finish(core, answers)["next"].num_cached_tokens == 128


@DEPTHS
def test_cached_tokens_are_those_of_the_prompt(max_in_flight: int) -> None:
    core, _ = make_core(max_in_flight=max_in_flight)
    request = make_request("r", 100, max_tokens=200, ignore_eos=True)
    answer = run(core, request)["r"]
    again = dataclasses.replace(request, output_token_ids=answer.token_ids[:150])
    core.add_request(again)
    rest = finish(core, {"r": Received(answer.token_ids[:150])})["r"]
    assert rest.token_ids == answer.token_ids and rest.num_cached_tokens == 100


@DEPTHS
def test_same_calls_give_the_same_plans(max_in_flight: int) -> None:
    plans = []
    for _ in range(2):
        core, executor = make_core(max_in_flight=max_in_flight, **TIGHT)
        run(core, *GROWING)
        plans.append(executor.plans)
    assert plans[0] == plans[1]


def test_a_row_stands_on_a_token_that_only_the_worker_knows() -> None:
    """One row a step for each request, none after the last token that max_tokens allows."""
    core, executor = make_core(max_in_flight=2)
    requests = [make_request(f"r{i}", 100 + 30 * i, max_tokens=5 + i, ignore_eos=True) for i in range(3)]
    answers = run(core, *requests)
    assert all(same(answers[request.request_id], expected(request)) for request in requests)
    rows = [[(row.slot, row.num_computed_tokens, row.sample) for row in plan.rows] for plan in executor.plans]
    in_turn, in_turn_executor = make_core()
    run(in_turn, *requests)
    assert rows == [[(r.slot, r.num_computed_tokens, r.sample) for r in plan.rows] for plan in in_turn_executor.plans]
    assert executor.num_rows_ahead == 4 + 5 + 6 and not in_turn_executor.num_rows_ahead


def test_preempted_with_a_token_in_flight_gets_it_once_and_re_enters_with_it() -> None:
    core, executor = make_core(num_pages=4, max_in_flight=2)
    requests = [make_request(f"r{i}", 127, max_tokens=200, ignore_eos=True, seed=i) for i in range(2)]
    answers: dict[str, Received] = {}
    for request in requests:
        core.add_request(request)
    while len(executor.plans) < 3 or len(executor.plans[-1].rows) == 2:
        step(core, answers)
    # The last plan took the pages of the younger one, while the plan before it had a row of it in flight.
    [state] = core.scheduler.waiting
    assert len(executor.plans[-2].rows) == 2 and executor.num_in_flight == 1
    known = state.num_output_tokens
    assert known == len(answers["r1"].token_ids) == len(executor.plans) - 1
    finish(core, answers)
    [again] = [new for plan in executor.plans[1:] for new in plan.new]
    assert again.token_ids == requests[1].prompt_token_ids + answers["r1"].token_ids[:known]
    assert all(same(answers[request.request_id], expected(request)) for request in requests)


def test_waits_for_its_token_in_flight_before_it_re_enters() -> None:
    """It could re-enter at once: whoever took its pages is gone."""
    core, executor = make_core(num_pages=4, max_in_flight=3)
    requests = [make_request(f"r{i}", 127, max_tokens=200, ignore_eos=True, seed=i) for i in range(2)]
    answers: dict[str, Received] = {}
    for request in requests:
        core.add_request(request)
    step_until_preemption(core, answers)
    [state] = core.scheduler.waiting
    assert state.num_pending_tokens == state.num_rows_in_flight == 1
    core.abort("r0")
    num_plans = len(executor.plans)
    step(core, answers)
    assert len(executor.plans) == num_plans and not state.num_rows_in_flight
    assert same(finish(core, answers)["r1"], expected(requests[1]))


def test_ends_by_the_token_in_flight_while_it_waits() -> None:
    """Preempted with its last token in flight: it ends in the queue."""
    core, executor = make_core(num_pages=4, max_in_flight=2)
    old = make_request("old", 127, max_tokens=200, ignore_eos=True)
    answers: dict[str, Received] = {}
    core.add_request(old)
    core.add_request(young := make_request("young", 127, max_tokens=130, ignore_eos=True))
    finish(core, answers)
    assert core.stats.preemptions == 1 and sum(len(plan.new) for plan in executor.plans) == 2
    assert same(answers["old"], expected(old)) and same(answers["young"], expected(young))


@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_not_finite_while_it_waits_its_pages_are_not_found(max_in_flight: int) -> None:
    core, executor = make_core(num_pages=4, max_in_flight=max_in_flight)
    old = make_request("old", 127, max_tokens=9, ignore_eos=True)
    answers: dict[str, Received] = {}
    core.add_request(old)
    core.add_request(make_request("bad", 254, max_tokens=9, seed=POISON_SEED, min_tokens=9))
    finish(core, answers)
    assert core.stats.preemptions == 1 and sum(len(plan.new) for plan in executor.plans) == 2
    assert answers["bad"].finish_reason is FinishReason.ERROR and len(answers["bad"].token_ids) == 2
    assert same(answers["old"], expected(old))
    assert run(core, make_request("again", 254, max_tokens=1))["again"].num_cached_tokens == 0


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_pages_of_a_prompt_that_was_not_sampled_from_are_cleared(max_in_flight: int) -> None:
    """Aborted between its chunks, nobody knows yet what its pages hold."""
    core, executor = make_core(
        num_pages=4, max_in_flight=max_in_flight, max_num_batched_tokens=128, enable_prefix_caching=False
    )
    core.add_request(make_request("bad", [POISON_TOKEN_ID] * 400, max_tokens=9))
    answers: dict[str, Received] = {}
    step(core, answers)
    core.abort("bad")
    good = make_request("good", 300, max_tokens=9)
    assert same(run(core, good)["good"], expected(good))
    assert any(plan.cleared for plan in executor.plans)


def test_what_ended_well_is_not_cleared() -> None:
    core, executor = make_core(num_pages=4, enable_prefix_caching=False)
    for index in range(3):
        run(core, make_request(str(index), 300, max_tokens=9))
    assert not any(plan.cleared for plan in executor.plans)
