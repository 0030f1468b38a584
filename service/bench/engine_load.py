"""Loads on an EngineCore, in this thread: what each request's client would see, timed where its events come out.

The core is driven step by step, not through `LLM.generate`, because a closed loop must start a request when another
ends, and because the time of every single token is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from engine.config import PAGE_SIZE
from engine.engine import EngineCore
from engine.errors import ConfigError
from engine.types import EngineRequest, SamplingParams

BUDGET = 8192
PROBE_INTERVAL = 32

LayerSums = dict[int, tuple[float, int]]


@dataclass(slots=True)
class Stream:
    """One request. times_s: of each of its tokens, from its start."""

    started_s: float
    times_s: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def ttft_s(self) -> float:
        return self.times_s[0]

    @property
    def tpot_s(self) -> float:
        """Mean interval between its tokens; of a single token, NaN."""
        gaps = len(self.times_s) - 1
        return (self.times_s[-1] - self.times_s[0]) / gaps if gaps else float("nan")


@dataclass(frozen=True, slots=True)
class SteadyDecode:
    """Steps in which every request got one token.

    intervals_s: between those steps.  steps: run in all, the prompts' too.  indexer_s, attention_s: mean time of a
    decode step's operations per layer, from the engine's probes; empty where no step was probed.  collective_s: of all
    collectives of a probed step on rank 0; None where no step was probed.
    """

    streams: list[Stream]
    intervals_s: list[float]
    steps: int
    preemptions: int
    indexer_s: dict[int, float]
    attention_s: dict[int, float]
    collective_s: float | None


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A fixed number of requests at the same time, each starting when another ended."""

    streams: list[Stream]
    wall_s: float
    steps: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is tried on each engine; lengths in tokens. repeats: prompts per prefill case.  requests_per_stream: of a
    closed loop per decode case; 0: none.  budget: of one step."""

    prefill_tokens: Sequence[int]
    concurrency: Sequence[int]
    context_tokens: Sequence[int]
    decode_steps: int
    repeats: int
    requests_per_stream: int = 0
    budget: int = BUDGET

    def max_tokens(self, rows: int, context: int) -> int:
        """Enough for the first request to live until all `rows` have decoded together."""
        return steps_of_prefill([context] * rows, self.budget) + self.decode_steps + 1

    def engine_settings(self) -> dict[str, Any]:
        """The sizes that every case fits in. ConfigError when there is no case."""
        cases = [(rows, context) for rows in self.concurrency for context in self.context_tokens]
        lengths = [(rows, context + self.max_tokens(rows, context)) for rows, context in cases]
        lengths += [(1, tokens + 1) for tokens in self.prefill_tokens]
        if not lengths:
            raise ConfigError("neither a prefill nor a decode case is given: there is nothing to measure")
        return {
            "max_model_len": max(length for _, length in lengths),
            "max_num_seqs": max(rows for rows, _ in lengths),
            "max_num_batched_tokens": self.budget,
            # The prompts of a decode case are to be done soon, whatever their neighbours wait.
            "max_num_prefill_tokens": self.budget,
            "long_prefill_token_threshold": 0,
            "num_pages": max(rows * -(-length // PAGE_SIZE) for rows, length in lengths) + 1,
            # A repeated prompt would be found instead of computed.
            "enable_prefix_caching": False,
            # Often enough for every case to be probed, too rarely to move a median.
            "probe_interval": PROBE_INTERVAL,
        }


def budget_of(settings: Mapping[str, Any]) -> int:
    """Load.budget beside settings that a user gave: no more than those let a step hold of prompts."""
    given = (settings.get(name) for name in ("max_num_batched_tokens", "max_num_prefill_tokens"))
    return min([BUDGET, *(tokens for tokens in given if isinstance(tokens, int))])


class _Driver:
    """Requests of one load, by id."""

    _next_id = 0

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.streams: dict[str, Stream] = {}
        self.first_step, self.first_preemption = core.stats.steps, core.stats.preemptions

    def start(self, prompt: list[int], max_tokens: int) -> None:
        _Driver._next_id += 1
        request_id = f"bench-{_Driver._next_id}"
        self.streams[request_id] = Stream(time.perf_counter())
        greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0)
        self.core.add_request(EngineRequest(request_id, prompt, greedy))

    def step(self) -> tuple[float, int]:
        """Run one step: when its results were there, and how many requests got a token."""
        events = self.core.step()
        now_s = time.perf_counter()
        num_tokens = 0
        for event in events:
            stream = self.streams.get(event.request_id)
            if stream is None:
                continue
            if event.error is not None:
                raise RuntimeError(f"request {event.request_id}: {event.error}")
            if event.token_ids:
                stream.times_s.append(now_s - stream.started_s)
                num_tokens += 1
            stream.ended = stream.ended or event.finish_reason is not None
        return now_s, num_tokens

    def stop(self) -> None:
        """End what still runs, and let the engine come to rest."""
        for request_id, stream in self.streams.items():
            if not stream.ended:
                self.core.abort(request_id)
        while self.core.has_work():
            self.core.step()

    @property
    def steps(self) -> int:
        return self.core.stats.steps - self.first_step

    @property
    def preemptions(self) -> int:
        return self.core.stats.preemptions - self.first_preemption


def steps_of_prefill(prompt_tokens: Sequence[int], budget: int) -> int:
    """At most so many steps pass until the last of these prompts has its first token, with all others decoding."""
    rows = len(prompt_tokens)
    return -(-sum(prompt_tokens) // max(1, budget - rows)) + rows + 8


def steady_decode(core: EngineCore, prompts: Sequence[list[int]], steps: int, max_tokens: int) -> SteadyDecode:
    """Prefill all prompts, then time `steps` steps in which all of them decode; then abort them.

    max_tokens: more than any request gets, see `steps_of_prefill`.
    """
    driver = _Driver(core)
    for prompt in prompts:
        driver.start(prompt, max_tokens)
    stamps: list[float] = []
    before: tuple[LayerSums, LayerSums] = ({}, {})
    collectives = (0.0, 0)
    while len(stamps) <= steps:
        now_s, num_tokens = driver.step()
        if any(stream.ended for stream in driver.streams.values()):
            driver.stop()
            raise RuntimeError(f"a request ended after {max_tokens} tokens, before all others had decoded {steps}")
        if num_tokens == len(prompts):
            stamps.append(now_s)
            if len(stamps) == 1:
                before, collectives = _probed(core), _collectives(core)
    after = _probed(core)
    seconds, samples = (late - early for late, early in zip(_collectives(core), collectives, strict=True))
    ran, preemptions = driver.steps, driver.preemptions
    driver.stop()
    return SteadyDecode(
        streams=list(driver.streams.values()),
        intervals_s=[late - early for early, late in pairwise(stamps)],
        steps=ran,
        preemptions=preemptions,
        indexer_s=_means(before[0], after[0]),
        attention_s=_means(before[1], after[1]),
        collective_s=seconds / samples if samples else None,
    )


def closed_loop(core: EngineCore, prompts: Sequence[list[int]], *, concurrency: int, output_tokens: int) -> ClosedLoop:
    """Run all prompts to their end, `concurrency` at a time."""
    driver = _Driver(core)
    pending = list(reversed(prompts))
    started_s = time.perf_counter()
    now_s, running = started_s, 0
    while pending or running:
        while pending and running < concurrency:
            driver.start(pending.pop(), output_tokens)
            running += 1
        now_s, _ = driver.step()
        running = sum(not stream.ended for stream in driver.streams.values())
    return ClosedLoop(list(driver.streams.values()), now_s - started_s, driver.steps, driver.preemptions)


def _probed(core: EngineCore) -> tuple[LayerSums, LayerSums]:
    """(seconds, samples) per layer, so far, of the decode steps' indexers and sparse attentions."""
    stats = core.stats
    indexer = {
        layer: (seconds, stats.indexer_samples[layer, phase])
        for (layer, phase), seconds in stats.indexer_s.items()
        if phase == "decode"
    }
    attention = {
        layer: (seconds, stats.sparse_attention_samples[layer, phase])
        for (layer, phase), seconds in stats.sparse_attention_s.items()
        if phase == "decode"
    }
    return indexer, attention


def _collectives(core: EngineCore) -> tuple[float, int]:
    """(seconds in collectives, probed steps) of rank 0, so far."""
    rank = core.stats.ranks.get(0)
    return (0.0, 0) if rank is None else (rank.collective_s, rank.samples)


def _means(before: LayerSums, after: LayerSums) -> dict[int, float]:
    means = {}
    for layer, (seconds, samples) in after.items():
        seconds_before, samples_before = before.get(layer, (0.0, 0))
        if samples > samples_before:
            means[layer] = (seconds - seconds_before) / (samples - samples_before)
    return means
