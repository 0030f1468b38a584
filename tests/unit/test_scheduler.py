"""The scheduler and the step loop against an executor that models a worker's memory and checks every plan.

The executor knows no maths: the next token is a hash of all tokens before it. But it stores, for every page,
which tokens under which prefix were written, so a request that reads a page it should not read is caught.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.config import PAGE_SIZE, EngineConfig
from engine.engine import EngineCore
from engine.errors import ConfigError, EngineDead, RequestError
from engine.types import (
    EngineInfo,
    EngineRequest,
    FinishReason,
    LayerOverlap,
    LayerSeconds,
    Logprobs,
    RequestEvent,
    SamplingParams,
    StepPlan,
    StepResult,
    StepRow,
)

MAX_MODEL_LEN = 512
VOCAB_SIZE = 50
EOS_TOKEN_IDS = (3, 4)
POISON_SEED = 666  # such a request's logits stop being finite at its third output token
UNMASKED_SEED = 2  # such a request may sample a stop token before min_tokens


def digest(token_ids: list[int], salt: int) -> int:
    key = (salt % 2**64).to_bytes(8)
    return int.from_bytes(hashlib.blake2b(array("I", token_ids).tobytes(), key=key, digest_size=8).digest())


def next_token(token_ids: list[int], prompt_len: int, sampling: SamplingParams) -> int:
    """What the model and sampler would say: a function of all tokens and the seed alone."""
    assert sampling.seed is not None
    num_output_tokens = len(token_ids) - prompt_len
    if sampling.seed == POISON_SEED and num_output_tokens == 2:
        return -2
    token_id = digest(token_ids, sampling.seed) % VOCAB_SIZE
    forbidden = {*(() if sampling.ignore_eos else EOS_TOKEN_IDS), *(sampling.stop_token_ids or ())}
    masked = num_output_tokens < sampling.min_tokens and sampling.seed != UNMASKED_SEED
    while masked and token_id in forbidden:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def logprob(token_ids: list[int]) -> Logprobs:
    """Of the last of these tokens, given the others."""
    return {token_ids[-1]: -(digest(token_ids, 0) % 1000) / 100}


@dataclass
class WorkerRequest:
    """A slot of the modelled worker."""

    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    num_computed_tokens: int | None = None
    block_table: list[int] = field(default_factory=list)


@dataclass
class PageContent:
    """What was written to a page: its first tokens, and the digest of everything before the page."""

    prefix: int
    token_ids: list[int]


class CheckingExecutor:
    """A worker group of one that holds each plan against its own books."""

    def __init__(self, config: EngineConfig, num_pages: int) -> None:
        self.config = config
        self.info = EngineInfo(
            model_name="model",
            plan="DFS",
            backend="torch",
            dtype="float32",
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            page_bytes=1,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=EOS_TOKEN_IDS,
            namespace="namespace",
            weight_bytes=1,
            tensor_parallel_size=1,
            ledger={},
        )
        self.plans: list[StepPlan] = []
        self.die_at_step: int | None = None
        self.error: Exception = EngineDead("killed")
        self.closed = 0
        self._slots: dict[int, WorkerRequest] = {}
        self._pages: dict[int, PageContent] = {}
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        if self.die_at_step is not None and plan.step_id >= self.die_at_step:
            raise self.error
        self._check_shape(plan)
        for slot in plan.released:
            del self._slots[slot]
        for new in plan.new:
            assert new.slot not in self._slots and 0 <= new.slot < self.config.max_num_seqs
            self._slots[new.slot] = WorkerRequest(new.token_ids, new.prompt_len, new.sampling)
        assert {new.slot for new in plan.new} <= {row.slot for row in plan.rows}
        for row in plan.rows:
            self._check_row(row)
        for row in plan.rows:
            self._write(row)
        self._results.append(self._result(plan))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def close(self) -> None:
        self.closed += 1

    def _check_shape(self, plan: StepPlan) -> None:
        assert plan.rows and 1 <= plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(plan.rows) == len({row.slot for row in plan.rows}) <= self.config.max_num_seqs
        assert len(set(plan.released)) == len(plan.released) and set(plan.released) <= self._slots.keys()

    def _check_row(self, row: StepRow) -> None:
        """Positions follow on, and every key that the row will read is the key of this request's own prefix."""
        request = self._slots[row.slot]
        start, end = row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens
        if request.num_computed_tokens is None:
            assert start % PAGE_SIZE == 0
        else:
            assert start == request.num_computed_tokens
        assert start < end <= len(request.token_ids)
        assert row.sample == (end == len(request.token_ids))
        request.block_table += row.new_page_ids
        assert len(request.block_table) == -(-end // PAGE_SIZE)
        assert len(set(request.block_table)) == len(request.block_table)
        assert all(0 <= page_id < self.info.num_pages for page_id in request.block_table)
        for first in range(0, start, PAGE_SIZE):
            content = self._pages[request.block_table[first // PAGE_SIZE]]
            assert content.prefix == digest(request.token_ids[:first], 0)
            expected = request.token_ids[first : min(start, first + PAGE_SIZE)]
            assert content.token_ids[: len(expected)] == expected
        request.num_computed_tokens = end

    def _write(self, row: StepRow) -> None:
        request = self._slots[row.slot]
        for position in range(row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens):
            page_id = request.block_table[position // PAGE_SIZE]
            if position % PAGE_SIZE == 0 or position == row.num_computed_tokens:
                holders = [other for other in self._slots.values() if page_id in other.block_table]
                assert holders == [request], f"page {page_id} is written while {len(holders)} requests hold it"
            if position % PAGE_SIZE == 0:
                self._pages[page_id] = PageContent(digest(request.token_ids[:position], 0), [])
            content = self._pages[page_id].token_ids
            assert len(content) == position % PAGE_SIZE
            content.append(request.token_ids[position])

    def _result(self, plan: StepPlan) -> StepResult:
        result = StepResult(step_id=plan.step_id, sampled=[])
        decode_rows: list[bool] = []
        for index, row in enumerate(plan.rows):
            request = self._slots[row.slot]
            end = row.num_computed_tokens + row.num_scheduled_tokens
            decode_rows.append(row.num_scheduled_tokens == 1 and row.num_computed_tokens >= request.prompt_len)
            if request.sampling.prompt_logprobs is not None and row.num_computed_tokens < request.prompt_len:
                known = range(row.num_computed_tokens + 1, min(end + 1, request.prompt_len))
                result.prompt_logprobs[index] = [logprob(request.token_ids[: p + 1]) for p in known]
            token_id = -1
            if row.sample:
                token_id = next_token(request.token_ids, request.prompt_len, request.sampling)
            if token_id >= 0:
                request.token_ids.append(token_id)
                if request.sampling.logprobs is not None:
                    result.logprobs[index] = logprob(request.token_ids)
            result.sampled.append(token_id)
        assert decode_rows == sorted(decode_rows, reverse=True)
        assert sum(decode_rows) == plan.num_decode_rows
        return result


@dataclass
class Received:
    """What a client has of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0

    def take(self, event: RequestEvent) -> None:
        assert self.finish_reason is None, "an event after the last"
        assert event.index == len(self.token_ids)
        assert (event.logprobs is None) or len(event.logprobs) == len(event.token_ids)
        if event.prompt_logprobs is not None:
            assert self.prompt_logprobs is None and not self.token_ids
            self.prompt_logprobs = event.prompt_logprobs
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        self.finish_reason = event.finish_reason
        self.stop_token_id = event.stop_token_id
        self.error = event.error
        self.num_cached_tokens = event.num_cached_tokens


def expected(request: EngineRequest) -> Received:
    """The whole answer, computed one token at a time without any engine."""
    received, sampling = Received(), request.sampling
    token_ids = list(request.prompt_token_ids)
    prompt_len = len(token_ids)
    stop_ids = {*(() if sampling.ignore_eos else EOS_TOKEN_IDS), *(sampling.stop_token_ids or ())}
    if sampling.prompt_logprobs is not None:
        received.prompt_logprobs = [None, *(logprob(token_ids[: p + 1]) for p in range(1, prompt_len))]
    while received.finish_reason is None:
        token_id = next_token(token_ids, prompt_len, sampling)
        if token_id == -2:
            received.finish_reason = FinishReason.ERROR
            break
        token_ids.append(token_id)
        received.token_ids.append(token_id)
        if sampling.logprobs is not None:
            received.logprobs.append(logprob(token_ids))
        if token_id in stop_ids and len(received.token_ids) > sampling.min_tokens:
            received.finish_reason, received.stop_token_id = FinishReason.STOP, token_id
        elif len(received.token_ids) == sampling.max_tokens:
            received.finish_reason = FinishReason.LENGTH
    if received.finish_reason is FinishReason.ERROR and not received.token_ids:
        received.prompt_logprobs = None
    return received


def make_core(num_pages: int = 16, **kwargs: object) -> tuple[EngineCore, CheckingExecutor]:
    config = EngineConfig.from_kwargs("model", probe_interval=0, **kwargs)
    executor = CheckingExecutor(config, num_pages)
    return EngineCore(config, executor), executor


def make_request(request_id: str, prompt: list[int] | int, **sampling: object) -> EngineRequest:
    prompt = [index % 40 + 5 for index in range(prompt)] if isinstance(prompt, int) else prompt
    return EngineRequest(request_id, prompt, SamplingParams(**{"seed": 1, **sampling}))  # type: ignore[arg-type]


def check_books(core: EngineCore) -> None:
    core.pool.check([state.page_ids for state in core.scheduler.running])
    assert all(state.slot < 0 and not state.page_ids for state in core.scheduler.waiting)
    slots = [state.slot for state in core.scheduler.running]
    assert len(set(slots)) == len(slots) <= core.scheduler.max_num_seqs


def step(core: EngineCore, answers: dict[str, Received]) -> None:
    """One step; hands out its events and checks the books, and that the oldest request has moved."""
    oldest = next(iter(core.scheduler), None)
    before = oldest.num_computed_tokens if oldest else 0
    events = core.step()
    for event in events:
        answers.setdefault(event.request_id, Received()).take(event)
    check_books(core)
    if oldest is not None:
        ended = answers.get(oldest.request_id, Received()).finish_reason is not None
        assert ended or oldest.num_computed_tokens > before, "the oldest request stands still"


def finish(core: EngineCore, answers: dict[str, Received]) -> dict[str, Received]:
    for _ in range(20_000):
        if not core.has_work():
            break
        step(core, answers)
    assert not core.has_work(), "it does not end"
    assert core.pool.num_held == 0 and not len(core.scheduler)
    return answers


def step_until_preemption(core: EngineCore, answers: dict[str, Received]) -> None:
    while not core.stats.preemptions:
        assert core.has_work(), "nothing was preempted"
        step(core, answers)


def run(core: EngineCore, *requests: EngineRequest) -> dict[str, Received]:
    for request in requests:
        core.add_request(request)
    return finish(core, {})


def same(answer: Received, reference: Received) -> bool:
    return dataclasses.replace(answer, error=None, num_cached_tokens=0) == reference


@st.composite
def request_lists(draw: st.DrawFn) -> list[EngineRequest]:
    """Requests whose prompts often share their first pages with those of others, and often outgrow the pool."""
    requests = []
    for index in range(draw(st.integers(1, 7))):
        length = draw(st.sampled_from([1, 5, 127, 128, 129, 200, 256, 257, 300, 361]))
        shared = min(draw(st.sampled_from([0, 128, 200, 256, 361])), length)
        own = draw(st.integers(0, 2))
        prompt = [(p * 7 + (own if p >= shared else 0)) % VOCAB_SIZE for p in range(length)]
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
        "max_num_seqs": st.sampled_from([1, 2, 3, 8]),
        "enable_prefix_caching": st.booleans(),
    }
)
TIGHT = {"num_pages": 4, "max_num_batched_tokens": 257, "max_num_seqs": 8, "enable_prefix_caching": True}
GROWING = [make_request(f"r{i}", 100 + i, max_tokens=300, ignore_eos=True, prompt_logprobs=0) for i in range(5)]
FAST = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@FAST
@given(requests=request_lists(), limits=LIMITS, arrivals=st.lists(st.integers(0, 12), min_size=7, max_size=7))
@example(requests=GROWING, limits=TIGHT, arrivals=[0] * 7)
def test_tokens_depend_on_the_request_alone(
    requests: list[EngineRequest], limits: dict[str, int], arrivals: list[int]
) -> None:
    """Whatever the pool, the budget, the batch and the order: every request ends once, with its own tokens."""
    core, _ = make_core(**limits)
    answers: dict[str, Received] = {}
    for request, num_steps in zip(requests, arrivals, strict=False):
        for _ in range(num_steps):
            step(core, answers)
        core.add_request(request)
    finish(core, answers)
    for request in requests:
        assert same(answers[request.request_id], expected(request))


@FAST
@given(requests=request_lists(), limits=LIMITS, data=st.data())
def test_abort_anywhere(requests: list[EngineRequest], limits: dict[str, int], data: st.DataObject) -> None:
    """An abort frees the pages at once and ends one request, once; the others do not notice."""
    core, _ = make_core(**limits)
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


@FAST
@given(requests=request_lists(), limits=LIMITS, other=LIMITS, num_steps=st.integers(1, 120))
def test_another_engine_continues_with_the_same_tokens(
    requests: list[EngineRequest], limits: dict[str, int], other: dict[str, int], num_steps: int
) -> None:
    """An engine dies; what it had delivered goes to another as output tokens; the client sees one answer."""
    core, executor = make_core(**limits)
    executor.die_at_step = num_steps
    answers = {request.request_id: Received() for request in requests}
    for request in requests:
        core.add_request(request)
    try:
        finish(core, answers)
    except EngineDead:
        with pytest.raises(EngineDead):
            core.step()
    heir, _ = make_core(**other)
    for request in requests:
        if answers[request.request_id].finish_reason is None:
            delivered = list(answers[request.request_id].token_ids)
            heir.add_request(dataclasses.replace(request, output_token_ids=delivered))
    finish(heir, answers)
    for request in requests:
        assert same(answers[request.request_id], expected(request))


def test_pages_run_out_the_youngest_are_preempted_and_still_finish() -> None:
    core, executor = make_core(**TIGHT)
    answers = run(core, *GROWING)
    assert core.stats.preemptions > 0
    assert all(same(answers[request.request_id], expected(request)) for request in GROWING)
    order = list(answers)
    assert order == sorted(order), "first come, first served"
    assert sum(len(plan.new) for plan in executor.plans) == len(GROWING) + core.stats.preemptions


def test_preemption_takes_the_youngest_and_puts_it_first_in_the_queue() -> None:
    core, _ = make_core(num_pages=6, max_num_seqs=4)
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


def test_prompt_logprobs_need_every_position_computed() -> None:
    core, _ = make_core()
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


def test_new_namespace_hides_the_pages_of_before_and_of_running_requests() -> None:
    core, _ = make_core()
    run(core, make_request("a", 300, max_tokens=1))
    core.add_request(make_request("b", 300, max_tokens=130, ignore_eos=True))
    answers: dict[str, Received] = {}
    step(core, answers)
    core.pool.set_namespace("other plan")
    finish(core, answers)
    assert answers["b"].num_cached_tokens == 256
    assert run(core, make_request("c", 300, max_tokens=1))["c"].num_cached_tokens == 0
    assert run(core, make_request("d", 300, max_tokens=1))["d"].num_cached_tokens == 256


def test_page_under_two_namespaces_is_never_found() -> None:
    """Also when the first namespace is back before the page is full."""
    core, _ = make_core()
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


def test_preempted_request_takes_up_the_namespace_it_re_enters_in() -> None:
    core, _ = make_core(num_pages=6)
    core.add_request(make_request("old", 130, max_tokens=300, ignore_eos=True))
    core.add_request(make_request("young", [8] * 130, max_tokens=300, ignore_eos=True))
    answers: dict[str, Received] = {}
    step_until_preemption(core, answers)
    core.pool.set_namespace("other plan")
    finish(core, answers)
    assert run(core, make_request("again", [8] * 130, max_tokens=1))["again"].num_cached_tokens == 128


def test_half_computed_page_of_an_aborted_request_is_not_found() -> None:
    core, _ = make_core(max_num_batched_tokens=200)
    core.add_request(make_request("gone", 300))
    step(core, {})
    core.abort("gone")
    answers = finish(core, {})
    core.add_request(make_request("next", 300))
    assert finish(core, answers)["next"].num_cached_tokens == 128


def test_cached_tokens_are_those_of_the_prompt() -> None:
    core, _ = make_core()
    request = make_request("r", 100, max_tokens=200, ignore_eos=True)
    answer = run(core, request)["r"]
    again = dataclasses.replace(request, output_token_ids=answer.token_ids[:150])
    core.add_request(again)
    rest = finish(core, {"r": Received(answer.token_ids[:150])})["r"]
    assert rest.token_ids == answer.token_ids and rest.num_cached_tokens == 100


def test_not_finite_logits_end_that_request_alone_and_its_pages_are_not_found() -> None:
    core, _ = make_core()
    bad = make_request("bad", 300, max_tokens=9, seed=POISON_SEED, min_tokens=9)
    good = make_request("good", [7] * 200, max_tokens=9)
    answers = run(core, bad, good)
    assert answers["bad"].finish_reason is FinishReason.ERROR
    assert answers["bad"].error is not None and "position 301" in answers["bad"].error
    assert len(answers["bad"].token_ids) == 2
    assert same(answers["good"], expected(good))
    again = make_request("again", 300, max_tokens=9)
    assert run(core, again)["again"].num_cached_tokens == 0
    assert core.stats.finished[FinishReason.ERROR] == 1


def test_stop_token_is_delivered_and_named() -> None:
    request = make_request("r", 20, max_tokens=400)
    reference = expected(request)
    assert reference.finish_reason is FinishReason.STOP
    core, _ = make_core()
    answer = run(core, request)["r"]
    assert answer.stop_token_id == answer.token_ids[-1] and answer.stop_token_id in EOS_TOKEN_IDS
    later = run(core, make_request("later", 20, max_tokens=400, min_tokens=len(answer.token_ids) + 20))["later"]
    assert len(later.token_ids) > len(answer.token_ids) + 20


def test_resubmission_of_an_answer_that_was_complete_only_says_so() -> None:
    core, executor = make_core()
    request = make_request("r", 20, max_tokens=7, ignore_eos=True)
    core.add_request(dataclasses.replace(request, output_token_ids=expected(request).token_ids))
    assert core.has_work()
    [event] = core.step()
    assert (event.index, event.token_ids, event.finish_reason) == (7, [], FinishReason.LENGTH)
    assert not executor.plans and not core.has_work()


def test_same_calls_give_the_same_plans() -> None:
    plans = []
    for _ in range(2):
        core, executor = make_core(**TIGHT)
        run(core, *GROWING)
        plans.append(executor.plans)
    assert plans[0] == plans[1]


def test_probe_and_audit_come_at_their_intervals() -> None:
    for reuse, audits in (("audited", [3, 6, 9]), ("lean", [])):
        config = EngineConfig(
            "model", probe_interval=4, audit_interval=3, index_reuse=reuse, enable_prefix_caching=False
        )
        executor = CheckingExecutor(config, 16)
        run(EngineCore(config, executor), make_request("r", 10, max_tokens=10, ignore_eos=True))
        assert [plan.step_id for plan in executor.plans if plan.probe] == [4, 8]
        assert [plan.step_id for plan in executor.plans if plan.audit] == audits


@pytest.mark.parametrize("error", [EngineDead("killed"), RuntimeError("out of memory")])
def test_dead_executor_ends_nothing_and_stays_dead(error: Exception) -> None:
    core, executor = make_core()
    core.add_request(make_request("r", 20, max_tokens=20, ignore_eos=True))
    executor.die_at_step, executor.error = 3, error
    answers: dict[str, Received] = {}
    step(core, answers)
    step(core, answers)
    with pytest.raises(EngineDead, match=str(error)):
        core.step()
    with pytest.raises(EngineDead, match=str(error)):
        core.step()
    with pytest.raises(EngineDead):
        core.add_request(make_request("r2", 20))
    assert len(executor.plans) == 3 and answers["r"].finish_reason is None
    core.close()
    assert executor.closed == 1


@pytest.mark.parametrize(
    "change",
    [
        {"step_id": 99},
        {"sampled": []},
        {"sampled": [VOCAB_SIZE]},
        {"sampled": [-1]},
        {"sampled": [-3]},
    ],
)
def test_result_that_does_not_answer_the_plan_is_the_end(change: dict[str, object]) -> None:
    core, executor = make_core()
    core.add_request(make_request("r", 20))
    collect = executor.collect
    executor.collect = lambda: dataclasses.replace(collect(), **change)  # type: ignore[method-assign,arg-type]
    with pytest.raises(EngineDead, match="step 1"):
        core.step()


@pytest.mark.parametrize(
    ("request_", "param", "code", "words"),
    [
        (make_request("r", []), "prompt", "invalid_value", ["0"]),
        (make_request("r", 512, max_tokens=1), "prompt", "context_length_exceeded", ["512"]),
        (
            make_request("r", 500, max_tokens=13),
            "max_tokens",
            "context_length_exceeded",
            ["500", "13", "512"],
        ),
        (make_request("r", [5, VOCAB_SIZE]), "prompt", "invalid_value", ["50"]),
        (make_request("r", [-1]), "prompt", "invalid_value", ["-1"]),
        (make_request("r", [True]), "prompt", "invalid_value", ["True"]),
        (make_request("r", 5, stop_token_ids=[50]), "stop_token_ids", "invalid_value", ["50"]),
        (make_request("r", 5, logit_bias={60: 1.0}), "logit_bias", "invalid_value", ["60", "50"]),
        (make_request("r", 5, seed=None), "seed", "invalid_value", ["seed"]),
        (make_request("busy", 5), "request_id", "duplicate_request_id", ["busy"]),
        (make_request("gone", 5), "request_id", "duplicate_request_id", ["gone"]),
    ],
)
def test_request_that_can_never_run_is_refused(
    request_: EngineRequest, param: str, code: str, words: list[str]
) -> None:
    core, _ = make_core()
    core.add_request(make_request("busy", 5))
    core.add_request(make_request("gone", 5))
    core.abort("gone")
    with pytest.raises(RequestError) as caught:
        core.add_request(request_)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert all(word in caught.value.message for word in words)
    answers = finish(core, {})
    assert {name: answer.finish_reason is FinishReason.ABORT for name, answer in answers.items()} == {
        "busy": False,
        "gone": True,
    }


def test_longest_request_runs_in_the_smallest_pool() -> None:
    core, _ = make_core(num_pages=4)
    request = make_request("r", 511, max_tokens=1)
    assert same(run(core, request)["r"], expected(request))
    with pytest.raises(RequestError, match="output_token_ids has 2 tokens"):
        core.add_request(dataclasses.replace(make_request("s", 5, max_tokens=1), output_token_ids=[6, 6]))


def test_pool_smaller_than_one_request_is_a_config_error() -> None:
    config = EngineConfig("model")
    executor = CheckingExecutor(config, num_pages=3)
    with pytest.raises(ConfigError, match=r"384 tokens.*max_model_len, 512"):
        EngineCore(config, executor)
    assert executor.closed == 1


def test_stats_count_and_drain_once() -> None:
    core, executor = make_core(enable_prefix_caching=False)
    collect = executor.collect

    def measured() -> StepResult:
        result = collect()
        result.seconds = [
            LayerSeconds("indexer", 1, "decode", 0.5),
            LayerSeconds("sparse_attention", 1, "decode", 2),
        ]
        result.overlaps = [LayerOverlap(2, 1.5, 2)]
        result.computed, result.reused = {1: 1}, {2: 1}
        result.forward_s, result.python_s = 0.25, 0.125
        return result

    executor.collect = measured  # type: ignore[method-assign]
    core.add_request(make_request("a", 300, max_tokens=4, ignore_eos=True))
    core.add_request(make_request("b", 10, max_tokens=2, ignore_eos=True))
    step(core, {})
    assert (core.stats.num_running, core.stats.num_waiting, core.stats.kv_usage) == (2, 0, 4 / 16)
    finish(core, {"a": Received([0]), "b": Received([0])})
    stats = core.stats
    assert (stats.steps, stats.computed_prompt_tokens, stats.generation_tokens) == (4, 310, 6)
    assert (stats.num_running, stats.kv_usage, stats.finished[FinishReason.LENGTH]) == (0, 0.0, 2)
    assert (stats.indexer_s, stats.indexer_samples) == ({(1, "decode"): 2.0}, {(1, "decode"): 4})
    assert (stats.sparse_attention_s, stats.sparse_attention_samples) == (
        {(1, "decode"): 8},
        {(1, "decode"): 4},
    )
    assert (stats.overlap_sum, stats.overlap_count) == ({2: 6.0}, {2: 8})
    assert (stats.selections_computed, stats.selections_reused) == ({1: 4}, {2: 4})
    assert (stats.forward_s, stats.python_s, stats.prefix_queries_tokens) == (1.0, 0.5, 0)
    observations = stats.drain()
    assert list(observations.step_tokens) == [310, 2, 1, 1] and list(observations.batch_size) == [2, 2, 1, 1]
    assert list(observations.prompt_tokens) == [10, 300] and list(observations.generation_tokens) == [2, 4]
    for name in ("queue_s", "prefill_s", "decode_s"):
        assert len(getattr(observations, name)) == 2 and min(getattr(observations, name)) >= 0
    assert len(observations.step_s) == 4 and sum(observations.step_s) == pytest.approx(stats.steps_s)
    assert not stats.drain().step_s
