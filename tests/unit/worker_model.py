"""A worker that knows no maths but checks every plan, and the answer each request must get from it.

The next token is a hash of all tokens before it. For every page the worker stores which tokens under which prefix
were written, so a request that reads a page it should not read is caught; so is one that gets a page with numbers that
are not finite.

Like a device that runs its steps in order, it runs each step when it is submitted, on what it knows itself, and
keeps what came out to itself until the step is collected.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import deque
from dataclasses import dataclass, field

from engine.config import PAGE_SIZE, EngineConfig
from engine.engine import EngineCore
from engine.errors import EngineDead
from engine.types import (
    EngineInfo,
    EngineRequest,
    FinishReason,
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
POISON_SEED = 666  # such a request's logits are not finite from its third output token on
POISON_TOKEN_ID = VOCAB_SIZE - 1  # in a prompt: from it on nothing is finite
UNMASKED_SEED = 2  # such a request may sample a stop token before min_tokens


def digest(token_ids: list[int], salt: int) -> int:
    key = (salt % 2**64).to_bytes(8)
    return int.from_bytes(hashlib.blake2b(array("I", token_ids).tobytes(), key=key, digest_size=8).digest())


def is_finite(token_ids: list[int], prompt_len: int, sampling: SamplingParams) -> bool:
    """Whether what is computed for the last of these tokens is."""
    is_poisoned = sampling.seed == POISON_SEED and len(token_ids) - prompt_len >= 2
    return not is_poisoned and POISON_TOKEN_ID not in token_ids[:prompt_len]


def next_token(token_ids: list[int], prompt_len: int, sampling: SamplingParams) -> int:
    """What the model and sampler would say: a function of all tokens and the seed alone."""
    assert sampling.seed is not None
    num_output_tokens = len(token_ids) - prompt_len
    if not is_finite(token_ids, prompt_len, sampling):
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
    """A slot of the modelled worker. num_told_tokens: those that whoever plans can know."""

    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    num_told_tokens: int
    num_computed_tokens: int | None = None
    block_table: list[int] = field(default_factory=list)


@dataclass
class PageContent:
    """What was written to a page: its first tokens, and the digest of everything before the page."""

    prefix: int
    token_ids: list[int]


class CheckingExecutor:
    """A worker group of one that holds each plan against its own books."""

    def __init__(self, config: EngineConfig, num_pages: int, max_in_flight: int = 1) -> None:
        self.config = config
        self.max_in_flight = max_in_flight
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
        self.num_rows_ahead = 0  # how many rows stood on a token that only the worker knew
        self._slots: dict[int, WorkerRequest] = {}
        self._pages: dict[int, PageContent] = {}
        self._not_finite: set[int] = set()
        self._results: deque[tuple[StepResult, list[WorkerRequest]]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._results)

    def submit(self, plan: StepPlan) -> None:
        assert self.num_in_flight < self.max_in_flight
        self.plans.append(plan)
        if self.die_at_step is not None and plan.step_id >= self.die_at_step:
            raise self.error
        self._check_shape(plan)
        for slot in plan.released:
            del self._slots[slot]
        for new in plan.new:
            assert new.slot not in self._slots and 0 <= new.slot < self.config.max_num_seqs
            token_ids = list(new.token_ids)
            self._slots[new.slot] = WorkerRequest(token_ids, new.prompt_len, new.sampling, len(token_ids))
        assert {new.slot for new in plan.new} <= {row.slot for row in plan.rows}
        self._not_finite -= set(plan.cleared)
        for row in plan.rows:
            self._check_row(row)
        for row in plan.rows:
            self._write(row)
        self._results.append((self._result(plan), [self._slots[row.slot] for row in plan.rows]))

    def collect(self) -> StepResult:
        result, requests = self._results.popleft()
        for request, token_id in zip(requests, result.sampled, strict=True):
            request.num_told_tokens += token_id >= 0
        return result

    def close(self) -> None:
        self.closed += 1

    def _check_shape(self, plan: StepPlan) -> None:
        assert plan.rows and 1 <= plan.num_tokens <= self.config.max_num_batched_tokens
        entering = {new.slot for new in plan.new}
        waits = any(row.slot not in entering for row in plan.rows[: plan.num_decode_rows])
        if waits and (limit := self.config.max_num_prefill_tokens) is not None:
            assert plan.num_tokens - plan.num_decode_rows <= limit
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
        if end > request.num_told_tokens:
            self.num_rows_ahead += 1
            assert row.num_scheduled_tokens == 1 and start >= request.prompt_len
        request.block_table += row.new_page_ids
        assert len(request.block_table) == -(-end // PAGE_SIZE)
        assert len(set(request.block_table)) == len(request.block_table)
        assert all(0 <= page_id < self.info.num_pages for page_id in request.block_table)
        for first in range(0, start, PAGE_SIZE):
            content = self._pages[request.block_table[first // PAGE_SIZE]]
            assert content.prefix == digest(request.token_ids[:first], 0)
            expected = request.token_ids[first : min(start, first + PAGE_SIZE)]
            assert content.token_ids[: len(expected)] == expected
        if is_finite(request.token_ids[:end], request.prompt_len, request.sampling):
            assert not self._not_finite & set(request.block_table), "0 * NaN is NaN"
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
            if not is_finite(request.token_ids[: position + 1], request.prompt_len, request.sampling):
                self._not_finite.add(page_id)

    def _result(self, plan: StepPlan) -> StepResult:
        result = StepResult(step_id=plan.step_id, sampled=[])
        decode_rows: list[bool] = []
        for index, row in enumerate(plan.rows):
            request = self._slots[row.slot]
            end = row.num_computed_tokens + row.num_scheduled_tokens
            is_single = row.num_scheduled_tokens == 1
            decode_rows.append(row.sample and is_single and row.num_computed_tokens >= request.prompt_len)
            if request.sampling.prompt_logprobs is not None and row.num_computed_tokens < request.prompt_len:
                known = range(row.num_computed_tokens + 1, min(end + 1, request.prompt_len))
                result.prompt_logprobs[index] = [logprob(request.token_ids[: p + 1]) for p in known]
            token_id = -1
            if row.sample:
                token_id = next_token(request.token_ids, request.prompt_len, request.sampling)
                # Where the logits were not finite, the device goes on with any token.
                request.token_ids.append(max(token_id, 0))
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


def make_core(num_pages: int = 16, max_in_flight: int = 1, **kwargs: object) -> tuple[EngineCore, CheckingExecutor]:
    config = EngineConfig.from_kwargs("model", probe_interval=0, **kwargs)
    executor = CheckingExecutor(config, num_pages, max_in_flight)
    return EngineCore(config, executor), executor


def make_request(request_id: str, prompt: list[int] | int, **sampling: object) -> EngineRequest:
    prompt = [index % 40 + 5 for index in range(prompt)] if isinstance(prompt, int) else prompt
    return EngineRequest(request_id, prompt, SamplingParams(**{"seed": 1, **sampling}))  # type: ignore[arg-type]


def check_books(core: EngineCore) -> None:
    core.pool.check([state.page_ids for state in core.scheduler.running])
    assert all(state.slot < 0 and not state.page_ids for state in core.scheduler.waiting)
    slots = [state.slot for state in core.scheduler.running]
    assert len(set(slots)) == len(slots) <= core.scheduler.max_num_seqs
    rows = [pair for step in core._in_flight for pair in zip(step.requests, step.plan.rows, strict=True)]
    for state in core.scheduler:
        own = [row for request, row in rows if request is state]
        assert (state.num_rows_in_flight, state.num_pending_tokens) == (len(own), sum(row.sample for row in own))
        assert not state.ended and len(state.token_ids) < state.max_tokens_total >= state.num_tokens


def step(core: EngineCore, answers: dict[str, Received]) -> None:
    """One step; hands out its events and checks the books, and that the oldest request has moved."""
    oldest = next(iter(core.scheduler), None)
    before = (oldest.num_computed_tokens, len(oldest.token_ids), -oldest.num_rows_in_flight) if oldest else ()
    in_flight_before = len(core._in_flight)
    events = core.step()
    for event in events:
        answers.setdefault(event.request_id, Received()).take(event)
    check_books(core)
    if oldest is not None:
        ended = answers.get(oldest.request_id, Received()).finish_reason is not None
        after = (oldest.num_computed_tokens, len(oldest.token_ids), -oldest.num_rows_in_flight)
        # Its rows may all be in steps behind the one that was collected.
        assert ended or after > before or in_flight_before > 1, "the oldest request stands still"


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
