"""Long prompts beside others: what a step may hold, who passes whom, and that nobody waits for ever."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.step_budget import CPU_PREFILL_TOKENS, BudgetLimits, StepBudget
from engine.types import EngineRequest
from tests.unit.worker_model import (
    MAX_MODEL_LEN,
    Received,
    expected,
    finish,
    make_core,
    make_request,
    same,
    step,
)

THRESHOLD = 40
SMALL = {"max_num_batched_tokens": 64, "long_prefill_token_threshold": THRESHOLD, "enable_prefix_caching": False}
FAST = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Request:
    """What the division of a step's tokens looks at."""

    num_runnable_tokens: int
    is_decoding: bool = False


PROMPTS = st.integers(0, 400).map(Request)
RUNNING = st.lists(st.one_of(PROMPTS, st.just(Request(1, is_decoding=True))), max_size=12)
LIMITS = st.builds(BudgetLimits, st.integers(1, 300), st.integers(1, 300), st.sampled_from([0, 1, 20, 100]))


@FAST
@given(limits=LIMITS, running=RUNNING)
def test_division_of_a_step(limits: BudgetLimits, running: list[Request]) -> None:
    """Within all limits, the oldest is certain of a token, both sorts of prompts of their half, and nothing is left."""
    budget = StepBudget(limits, running)
    shares = [budget.take(request) for request in running]
    num_decode = sum(share for request, share in zip(running, shares, strict=True) if request.is_decoding)
    cap = limits.max_num_batched_tokens - num_decode
    if any(request.is_decoding for request in running):
        cap = min(cap, limits.max_num_prefill_tokens)
    kinds = [request.num_runnable_tokens and not request.is_decoding for request in running]
    is_long = [limits.is_long(request.num_runnable_tokens) for request in running]
    last_long = max((i for i, long in enumerate(is_long) if long), default=-1)
    wanted = [request.num_runnable_tokens for request in running]
    longs = [i for i, long in enumerate(is_long) if long]
    shorts = [i for i, kind in enumerate(kinds) if kind and not is_long[i]]
    of_long, of_short = sum(shares[i] for i in longs), sum(shares[i] for i in shorts)
    older_shorts = sum(shares[i] for i in shorts if i < last_long)
    assert of_long >= min(sum(wanted[i] for i in longs), -(-cap // 2), cap - older_shorts)
    assert of_short >= min(sum(wanted[i] for i in shorts), cap // 2 if limits.long_prefill_token_threshold else 0)
    if wanted and wanted[0]:
        assert shares[0], "the oldest stands still"
    for i, share in enumerate(shares):
        assert 0 <= share <= wanted[i]
        shares[i] += budget.take_more(wanted[i] - share) if share else 0
    assert sum(shares) - num_decode <= cap
    assert not budget.prefill or all(shares[i] == wanted[i] for i in range(len(shares)) if shares[i])


def test_limits_that_are_not_set() -> None:
    config = EngineConfig("m", max_num_batched_tokens=4096)
    assert BudgetLimits.of(config, "torch") == BudgetLimits(4096, CPU_PREFILL_TOKENS, 4096)
    assert BudgetLimits.of(config, "triton") == BudgetLimits(4096, 4096, 4096)
    config = EngineConfig("m", max_num_prefill_tokens=512, long_prefill_token_threshold=0)
    assert BudgetLimits.of(config, "triton") == BudgetLimits(2048, 512, 0)


@st.composite
def mixtures(draw: st.DrawFn) -> list[tuple[int, EngineRequest]]:
    """Long and short requests, none of whose prompts begins like another; each with the steps before it comes."""
    out = []
    for index in range(draw(st.integers(2, 12))):
        length = draw(st.sampled_from([3, 20, 20, 60, 130, 250, 400]))
        prompt = [index + 5, *(p % 40 + 5 for p in range(length - 1))]
        max_tokens = min(draw(st.sampled_from([1, 5, 40, 112])), MAX_MODEL_LEN - length)
        out.append((draw(st.integers(0, 4)), make_request(f"r{index}", prompt, max_tokens=max_tokens, ignore_eos=True)))
    return out


@FAST
@given(
    mixture=mixtures(),
    num_pages=st.sampled_from([4, 5, 8, 24]),
    max_num_seqs=st.sampled_from([1, 2, 4, 8]),
    max_num_prefill_tokens=st.sampled_from([1, 16, 64]),
)
def test_nobody_is_passed_for_ever(mixture: list[tuple[int, EngineRequest]], num_pages: int, **limits: int) -> None:
    """Short prompts alone pass, long ones alone are passed, by no more tokens than they have and one short prompt."""
    core, _ = make_core(num_pages, **SMALL, **limits)
    answers: dict[str, Received] = {}
    passed: Counter[str] = Counter()
    for num_steps, request in mixture:
        for _ in range(num_steps):
            watch(core, answers, passed)
        core.add_request(request)
    while core.has_work():
        watch(core, answers, passed)
    for _, request in mixture:
        assert same(answers[request.request_id], expected(request))
    assert core.pool.num_held == 0


def watch(core: EngineCore, answers: dict[str, Received], passed: Counter[str]) -> None:
    """One step, and who passed whom in it."""
    waiting = [(state, state.num_tokens) for state in core.scheduler.waiting]
    step(core, answers)
    for queue in (core.scheduler.running, core.scheduler.waiting):
        assert [state.arrival for state in queue] == sorted(state.arrival for state in queue)
    still = {state.request_id for state in core.scheduler.waiting}
    for i, (state, num_tokens) in enumerate(waiting):
        overtook = [length for other, length in waiting[i + 1 :] if other.request_id not in still]
        if state.request_id not in still or not overtook:
            continue
        assert num_tokens > THRESHOLD >= max(overtook)
        if i == 0:
            passed[state.request_id] += sum(overtook)
            assert passed[state.request_id] <= num_tokens + THRESHOLD


def two_long_and_three_short(**settings: int) -> tuple[list[list[int]], list[str]]:
    """The shares of each step, decode rows first, and who ends when."""
    core, executor = make_core(24, max_num_seqs=8, max_num_prefill_tokens=32, **(SMALL | settings))
    answers: dict[str, Received] = {}
    core.add_request(make_request("long", [5] * 400, max_tokens=1))
    step(core, answers)
    core.add_request(make_request("longer", [6] * 450, max_tokens=1))
    for i in range(3):
        core.add_request(make_request(f"short{i}", [7 + i] * 20, max_tokens=3, ignore_eos=True))
    finish(core, answers)
    return [[row.num_scheduled_tokens for row in plan.rows] for plan in executor.plans], list(answers)


def test_short_prompts_pass_a_long_one_and_both_move() -> None:
    shares, order = two_long_and_three_short()
    assert order == ["short0", "short1", "short2", "long", "longer"]
    assert shares[:7] == [
        [64],  # nobody else is there
        [32, 20, 12],  # half of it for short ones, of which the last gets what is left
        [1, 16, 8, 8],  # 32 tokens of prompts beside a decode row
        [1, 1, 20, 12],  # what the short one does not want goes to the long one
        [1, 1, 32],
        [1, 32],
        [64],
    ]


def test_threshold_0_is_the_order_of_arrival() -> None:
    shares, order = two_long_and_three_short(long_prefill_token_threshold=0)
    assert order == ["long", "longer", "short0", "short1", "short2"]
    assert shares[:7] == [[64], [64], [64], [64], [64], [64], [16, 48]]


def test_a_prompt_that_was_passed_by_as_much_as_it_has_is_next() -> None:
    """Also while another long one is being computed; after that it shares that one's half."""
    core, executor = make_core(24, max_num_seqs=8, **SMALL)
    answers: dict[str, Received] = {}
    core.add_request(make_request("long", [5] * 500, max_tokens=1))
    core.add_request(make_request("next", [6] * 60, max_tokens=1))
    for i in range(8):
        core.add_request(make_request(f"short{i}", [7 + i] * 30, max_tokens=1))
    step(core, answers)
    assert [state.request_id for state in core.scheduler.waiting][:2] == ["next", "short2"]
    step(core, answers)
    # Two short ones have passed, of 60 tokens together.
    assert [state.request_id for state in core.scheduler.running] == ["long", "next", "short2"]
    assert [row.num_scheduled_tokens for row in executor.plans[-1].rows] == [32, 28, 1, 3]
    finish(core, answers)
    assert [f"short{i}" for i in range(8)] == [name for name in answers if name.startswith("short")]
