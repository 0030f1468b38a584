"""What the engine counts: plain numbers, that the service turns into Prometheus series.

Counters only grow; gauges are as of the last step; observations are kept until `drain`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeVar

from engine.types import FinishReason, RankTimes, StepResult

# Where nobody drains (offline use), the oldest observations go.
MAX_OBSERVATIONS = 65536

LayerPhase = tuple[int, str]  # layer_id, "prefill" or "decode"


K = TypeVar("K")
N = TypeVar("N", int, float)


def _add(sums: dict[K, N], key: K, value: N) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _observations() -> deque[float]:
    return deque(maxlen=MAX_OBSERVATIONS)


@dataclass(slots=True)
class Observations:
    """Values for histograms since the last drain, in order.

    queue_s: from arrival to the first step.  prefill_s: from there to the first token.  decode_s: from there
    to the end.  prompt_tokens, generation_tokens: of requests that ended.  step_s, step_tokens, batch_size:
    per step.
    """

    queue_s: deque[float] = field(default_factory=_observations)
    prefill_s: deque[float] = field(default_factory=_observations)
    decode_s: deque[float] = field(default_factory=_observations)
    prompt_tokens: deque[float] = field(default_factory=_observations)
    generation_tokens: deque[float] = field(default_factory=_observations)
    step_s: deque[float] = field(default_factory=_observations)
    step_tokens: deque[float] = field(default_factory=_observations)
    batch_size: deque[float] = field(default_factory=_observations)


@dataclass(slots=True)
class RankSums:
    """Sums of one rank over its probed steps. Of forward_s, collective_s was spent in collectives."""

    forward_s: float = 0.0
    collective_s: float = 0.0
    samples: int = 0


@dataclass(slots=True)
class EngineStats:
    """Counters and gauges of one engine.

    kv_usage: share of pages that requests hold, [0, 1]; pages that are only findable count as free.
    held_pages, cached_pages, blank_pages: see PagePool.  page_evictions: cached pages that were given away.
    prefix_queries_tokens, prefix_hits_tokens: tokens looked up at first admission, and found.
    computed_prompt_tokens: prompt tokens run, those recomputed after preemption included.
    generation_tokens: sampled and sent.  prefill_tokens, decode_tokens: run in rows of either sort.
    forward_s, python_s: sums of what rank 0 reported.  steps_s, plan_s: sums over steps.  ranks: by rank.
    indexer_s, sparse_attention_s and *_samples: (layer_id, phase) -> sums over probed steps.
    selections_computed, selections_reused: layer_id -> count.
    overlap_sum, overlap_count: layer_id -> sums over audits.
    page_check_failures: times the page accounting did not balance.  not_finite: requests ended by their logits.
    guided_tokens: sampled under a mask.  mask_s: host time on rank 0 for the masks.  not_guided: requests ended because
    their grammar could not go on.
    guard_active: whether the audit's guard has every sparse layer select for itself.  guard_trips: how often it began.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    held_pages: int = 0
    cached_pages: int = 0
    blank_pages: int = 0

    steps: int = 0
    steps_s: float = 0.0
    forward_s: float = 0.0
    python_s: float = 0.0
    plan_s: float = 0.0
    preemptions: int = 0
    page_evictions: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    computed_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    ranks: dict[int, RankSums] = field(default_factory=dict)
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))

    indexer_s: dict[LayerPhase, float] = field(default_factory=dict)
    indexer_samples: dict[LayerPhase, int] = field(default_factory=dict)
    sparse_attention_s: dict[LayerPhase, float] = field(default_factory=dict)
    sparse_attention_samples: dict[LayerPhase, int] = field(default_factory=dict)
    selections_computed: dict[int, int] = field(default_factory=dict)
    selections_reused: dict[int, int] = field(default_factory=dict)
    overlap_sum: dict[int, float] = field(default_factory=dict)
    overlap_count: dict[int, int] = field(default_factory=dict)
    page_check_failures: int = 0
    not_finite: int = 0
    guided_tokens: int = 0
    mask_s: float = 0.0
    not_guided: int = 0
    guard_active: bool = False
    guard_trips: int = 0

    observations: Observations = field(default_factory=Observations)

    def add_result(self, result: StepResult) -> None:
        """Count what rank 0 measured in one step."""
        self.forward_s += result.forward_s
        self.python_s += result.python_s
        self.guided_tokens += result.num_guided
        self.mask_s += result.mask_s
        for times in result.rank_times:
            self._add_rank(times)
        for timing in result.seconds:
            key = (timing.layer_id, timing.phase)
            if timing.op == "indexer":
                _add(self.indexer_s, key, timing.seconds)
                _add(self.indexer_samples, key, 1)
            else:
                _add(self.sparse_attention_s, key, timing.seconds)
                _add(self.sparse_attention_samples, key, 1)
        for layer_id, count in result.computed.items():
            _add(self.selections_computed, layer_id, count)
        for layer_id, count in result.reused.items():
            _add(self.selections_reused, layer_id, count)
        for overlap in result.overlaps:
            _add(self.overlap_sum, overlap.layer_id, overlap.overlap_sum)
            _add(self.overlap_count, overlap.layer_id, overlap.count)

    def _add_rank(self, times: RankTimes) -> None:
        sums = self.ranks.setdefault(times.rank, RankSums())
        sums.forward_s += times.forward_s
        sums.collective_s += times.collective_s
        sums.samples += 1

    def drain(self) -> Observations:
        """The observations since the last call; each is handed out once."""
        observations, self.observations = self.observations, Observations()
        return observations
