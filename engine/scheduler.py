"""Continuous batching: which tokens of which requests run in the next step, and on which pages.

There is no prefill or decode phase: every request has known tokens and computed tokens, and each step lets
the second catch up with the first as far as the token budget goes (the idea of vLLM's v1 scheduler); how that is
divided: step_budget.py. Decisions depend on the order of calls alone: no clock, no hashing order.

Order: `running` and `waiting` are each in order of arrival. The oldest that runs can take every page of the younger
ones and alone fits the pool, so each step moves it, and all work ends.

Requests are admitted in order of arrival too, with one exception: a long prompt lets shorter ones pass while it has no
pages, or while another long one is being computed. No more prompt tokens pass the head of the queue than it has itself
(and one short prompt); then it is next, whatever else is being computed. Short prompts pass no short ones, long ones
nobody.

A step is planned while earlier ones may still be in flight. The token that one of them samples counts from then
on as known, by its position: the next row can stand on it, since steps run in order. What the token is, and so
whether it is the last, shows when the step is collected; rows planned for a request that it ended are stale.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.config import PAGE_SIZE
from engine.metrics import EngineStats
from engine.pages import PagePool, hash_page, pages_for
from engine.step_budget import BudgetLimits, StepBudget
from engine.timeline import Timeline
from engine.types import Logprobs, NewRequest, SamplingParams, StepPlan, StepRow

# Long prompts at the head of the queue that a step looks past: finding what the prefix cache has of each takes time.
MAX_LOOK_PAST = 32


@dataclass(slots=True, eq=False)
class RequestState:
    """One unfinished request.

    arrival: requests in order of arrival have rising numbers.  num_passed_tokens: that others had to compute who were
    admitted while it was the head of the queue.
    token_ids: everything known, prompt then output.  num_pending_tokens: of those that follow, how many steps in
    flight sample.  num_rows_in_flight: its rows in steps in flight.  ended: it got its last event, and what steps
    in flight say of it is stale.  slot, page_ids: only while it runs.
    num_computed_tokens: as of the last planned step.  num_checked_tokens: the first of these, behind which a token was
    sampled: what was computed for them is finite.  num_registered_pages: its first pages that are done
    with the prefix cache.  page_hashes: of its full pages, made when needed; valid in pool epoch `epoch`.
    num_cached_tokens: of its prompt, at first admission; None before.  prompt_logprobs: gathered so far, None
    first; None when nobody waits for them.  *_s: time.monotonic(), for the statistics only.  timeline: of a traced
    request.
    """

    request_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    arrival_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    slot: int = -1
    num_computed_tokens: int = 0
    page_ids: list[int] = field(default_factory=list)
    num_registered_pages: int = 0
    page_hashes: list[bytes] = field(default_factory=list)
    epoch: int = 0
    num_cached_tokens: int | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    num_pending_tokens: int = 0
    num_rows_in_flight: int = 0
    ended: bool = False
    timeline: Timeline | None = None
    arrival: int = 0
    num_passed_tokens: int = 0
    num_checked_tokens: int = 0

    @property
    def is_decoding(self) -> bool:
        """Whether it runs its newest token next, an output. One output token of several that a request re-enters with
        is not that: the worker has the newest token of a slot at hand, no other."""
        return self.num_runnable_tokens == 1 and self.num_computed_tokens >= self.prompt_len

    @property
    def is_due(self) -> bool:
        """Whether nobody may pass it in the queue any more."""
        return self.num_passed_tokens >= self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Known and pending."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_runnable_tokens(self) -> int:
        """How many tokens wait to be computed: none once the last that max_tokens allows is being sampled."""
        return 0 if self.num_tokens == self.max_tokens_total else self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def max_tokens_total(self) -> int:
        """The most tokens that it can ever know."""
        return self.prompt_len + self.sampling.max_tokens


@dataclass(slots=True)
class Step:
    """A plan on its way, with the request behind each of its rows. started_s: time.monotonic() of its planning."""

    plan: StepPlan
    requests: list[RequestState]
    started_s: float = 0.0


@dataclass(slots=True)
class _Share:
    """What a request gets of the step that is being planned. page_ids: that the worker does not know of yet."""

    request: RequestState
    num_tokens: int
    page_ids: list[int]


class Scheduler:
    """Owns the queues, the slots and the pages.

    `schedule` plans a step, which the caller runs. Steps are collected in the order of their plans: for each row
    the caller calls `collected`, and unless the request has ended in the meantime it calls `commit` and appends
    the sampled token, or calls `remove` when the request ends.
    """

    def __init__(self, pool: PagePool, stats: EngineStats, *, max_num_seqs: int, limits: BudgetLimits) -> None:
        self.pool = pool
        self.stats = stats
        self.max_num_seqs = max_num_seqs
        self._limits = limits
        self.running: list[RequestState] = []
        self.waiting: deque[RequestState] = deque()
        self._free_slots = list(range(max_num_seqs))
        self._released: list[int] = []
        self._last_step_id = 0
        self._num_added = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def __iter__(self) -> Iterator[RequestState]:
        """Every unfinished request."""
        yield from self.running
        yield from self.waiting

    def add(self, request: RequestState) -> None:
        """Put a request at the end of the queue; the caller has checked that it fits the pool when alone."""
        self._num_added += 1
        request.arrival = self._num_added
        self.waiting.append(request)

    def remove(self, request: RequestState, *, findable: bool = True) -> None:
        """Take a request out, wherever it is; its pages are free at once, also under a stale row: that writes
        only behind what was committed, and before any step that gets the pages. findable=False: what it computed is
        not finite."""
        request.ended = True
        if request.slot >= 0:
            self.running.remove(request)
            self._release(request, findable=findable)
            return
        self.waiting.remove(request)
        if not findable:
            # Preempted with the bad row in flight: its pages were left to be found.
            left = [page_id for key in request.page_hashes for page_id in self.pool.match_prefix([key])]
            self.pool.touch(left)
            self.pool.free(left, findable=False, unchecked=left)

    def collected(self, request: RequestState, row: StepRow) -> None:
        """The result of this row is there: it is not in flight any more, and what it sampled is not pending."""
        request.num_rows_in_flight -= 1
        request.num_pending_tokens -= row.sample

    def commit(self, request: RequestState, num_computed_tokens: int) -> None:
        """Make the full pages of the first `num_computed_tokens` tokens findable: their step was
        collected. Not when the request was preempted in the meantime: the pages belong to others."""
        if not self.pool.enable_prefix_caching or request.epoch != self.pool.epoch or request.slot < 0:
            return
        num_full_pages = num_computed_tokens // PAGE_SIZE
        self._extend_hashes(request, num_full_pages)
        for index in range(request.num_registered_pages, num_full_pages):
            self.pool.register(request.page_ids[index], request.page_hashes[index])
        request.num_registered_pages = max(request.num_registered_pages, num_full_pages)

    def schedule(self) -> Step | None:
        """Plan the next step; None when there is nothing to do before a step in flight is collected.

        A plan always holds the oldest request that runs, unless that one waits for a step in flight.
        """
        if not len(self):
            return None
        budget = StepBudget(self._limits, self.running)
        has_long = any(self._limits.is_long(request.num_runnable_tokens) for request in self.running)
        shares: list[_Share] = []
        # The list shrinks from its end while it is walked: see _grow.
        for request in self.running:
            num_tokens = budget.take(request)
            if not num_tokens:
                continue
            page_ids = self._grow(request, num_tokens)
            if page_ids is None:
                break
            shares.append(_Share(request, num_tokens, page_ids))
        new = self._admit_waiting(budget, shares, has_long=has_long)
        self._give_rest(budget, shares)
        if not shares:
            assert any(request.num_rows_in_flight for request in self), "unfinished requests, and none can run"
            return None
        return self._step([(share.request, _advance(share)) for share in shares], new)

    def _admit_waiting(self, budget: StepBudget, shares: list[_Share], *, has_long: bool) -> list[NewRequest]:
        """Admit who may, with a share of this step each. has_long: a long prompt is being computed."""
        new: list[NewRequest] = []
        num_passed = 0  # the first of the queue, all of them long
        while (
            num_passed < min(len(self.waiting), MAX_LOOK_PAST)
            and budget.prefill > 0
            and len(self.running) < self.max_num_seqs
        ):
            request = self.waiting[num_passed]
            # The worker is to get all tokens of a request, so none may be pending.
            if request.num_rows_in_flight:
                break
            hits = self._prefix_hits(request)
            num_tokens = request.num_tokens - len(hits) * PAGE_SIZE
            is_long = self._limits.is_long(num_tokens)
            must_wait = is_long and (num_passed > 0 or (has_long and not request.is_due))
            if must_wait or not self._fits(request, hits):
                if not is_long or request.is_due:
                    break
                num_passed += 1
                continue
            if num_passed:
                self.waiting[0].num_passed_tokens += num_tokens
            has_long = has_long or is_long
            self._admit(request, hits)
            new.append(NewRequest(request.slot, list(request.token_ids), request.prompt_len, request.sampling))
            # A new request must have a row.
            num_tokens = budget.take(request) or budget.take_more(1)
            page_ids = self._grow(request, num_tokens)
            assert page_ids is not None, "admission promised pages that are not there"
            shares.append(_Share(request, num_tokens, hits + page_ids))
            if num_passed and self.waiting[0].is_due:
                break
        return new

    def _give_rest(self, budget: StepBudget, shares: list[_Share]) -> None:
        """What nobody wanted goes to prompts that could use it, the oldest first; nobody is preempted for it."""
        for share in shares:
            request = share.request
            max_tokens = (len(request.page_ids) + self.pool.num_free) * PAGE_SIZE - request.num_computed_tokens
            num_wanted = min(request.num_runnable_tokens, max_tokens) - share.num_tokens
            if num_tokens := budget.take_more(num_wanted):
                share.num_tokens += num_tokens
                page_ids = self._grow(request, share.num_tokens)
                assert page_ids is not None, "a prompt was given more than the pool has"
                share.page_ids += page_ids

    def _step(self, rows: list[tuple[RequestState, StepRow]], new: list[NewRequest]) -> Step:
        decode = [pair for pair in rows if _is_decode(*pair)]
        rows = decode + [pair for pair in rows if not _is_decode(*pair)]
        for request, row in rows:
            request.num_rows_in_flight += 1
            request.num_pending_tokens += row.sample
        released, self._released = self._released, []
        self._last_step_id += 1
        plan = StepPlan(
            step_id=self._last_step_id,
            rows=[row for _, row in rows],
            num_decode_rows=len(decode),
            new=new,
            released=released,
            cleared=self.pool.take_dirty(),
        )
        return Step(plan, [request for request, _ in rows])

    def _grow(self, request: RequestState, num_scheduled_tokens: int) -> list[int] | None:
        """Give a running request the pages for its next tokens, which it loses when it is preempted itself:
        None.

        Whoever is youngest is preempted until there are enough.
        """
        num_new_pages = pages_for(request.num_computed_tokens + num_scheduled_tokens) - len(request.page_ids)
        while (page_ids := self.pool.allocate(num_new_pages)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return None
        request.page_ids += page_ids
        return page_ids

    def _preempt(self, request: RequestState) -> None:
        """Back to its place in the queue; what it had computed stays findable until the pages are needed."""
        assert self.running.pop() is request
        self._release(request, findable=True)
        insort(self.waiting, request, key=_arrival)
        self.stats.preemptions += 1
        if request.timeline is not None:
            request.timeline.preempt()

    def _release(self, request: RequestState, *, findable: bool) -> None:
        """Give its pages back. Masked keys have weight 0, and 0 * NaN is NaN: who gets a page next must not find what
        was computed and not checked yet."""
        num_checked_tokens = request.num_checked_tokens if findable else 0
        is_checked = num_checked_tokens >= request.num_computed_tokens
        unchecked = [] if is_checked else request.page_ids[num_checked_tokens // PAGE_SIZE :]
        self.pool.free(request.page_ids, findable=findable, unchecked=unchecked)
        request.page_ids = []
        request.num_computed_tokens = request.num_checked_tokens = 0
        self._released.append(request.slot)
        heapq.heappush(self._free_slots, request.slot)
        request.slot = -1

    def _fits(self, request: RequestState, hits: list[int]) -> bool:
        """Whether all its known tokens fit the pool, beside one more page for each running request: one that would be
        preempted again at once had better wait. hits: pages that the prefix cache has for it."""
        headroom = sum(
            pages_for(min(other.num_tokens + PAGE_SIZE, other.max_tokens_total)) - len(other.page_ids)
            for other in self.running
        )
        num_needed = pages_for(request.num_tokens) - len(hits) + self.pool.num_free_among(hits)
        return num_needed + headroom <= self.pool.num_free

    def _admit(self, request: RequestState, hits: list[int]) -> None:
        """Move a request that fits from the queue to `running`, on the pages that the prefix cache has for it."""
        self.waiting.remove(request)
        insort(self.running, request, key=_arrival)
        self.pool.touch(hits)
        request.page_ids = list(hits)
        request.num_registered_pages = len(hits)
        request.num_computed_tokens = request.num_checked_tokens = len(hits) * PAGE_SIZE
        request.slot = heapq.heappop(self._free_slots)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.prompt_len)
            if self.pool.enable_prefix_caching and request.prompt_logprobs is None:
                self.stats.prefix_queries_tokens += request.num_tokens
                self.stats.prefix_hits_tokens += request.num_computed_tokens

    def _prefix_hits(self, request: RequestState) -> list[int]:
        if request.epoch != self.pool.epoch:
            request.epoch = self.pool.epoch
            request.page_hashes = []
        if not self.pool.enable_prefix_caching:
            return []
        # One token at least must run, or there is nothing to sample from.
        limit_tokens = request.num_tokens - 1
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) < request.prompt_len:
            # A position that is not computed yields no log-probabilities; those of earlier runs are kept.
            limit_tokens = len(request.prompt_logprobs) - 1
        num_pages = limit_tokens // PAGE_SIZE
        self._extend_hashes(request, num_pages)
        return self.pool.match_prefix(request.page_hashes[:num_pages])

    def _extend_hashes(self, request: RequestState, num_pages: int) -> None:
        for index in range(len(request.page_hashes), num_pages):
            parent = request.page_hashes[-1] if request.page_hashes else self.pool.root_hash
            page_tokens = request.token_ids[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            request.page_hashes.append(hash_page(parent, page_tokens))


def _arrival(request: RequestState) -> int:
    return request.arrival


def _advance(share: _Share) -> StepRow:
    """The row of a share; its tokens count as computed from here on, since steps run in order."""
    request, start = share.request, share.request.num_computed_tokens
    request.num_computed_tokens += share.num_tokens
    return StepRow(
        slot=request.slot,
        num_computed_tokens=start,
        num_scheduled_tokens=share.num_tokens,
        new_page_ids=share.page_ids,
        sample=request.num_computed_tokens == request.num_tokens,
    )


def _is_decode(request: RequestState, row: StepRow) -> bool:
    """As RequestState.is_decoding, for a row whose tokens count as computed."""
    return row.sample and row.num_scheduled_tokens == 1 and row.num_computed_tokens >= request.prompt_len
