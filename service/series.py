"""Who writes which series: an engine replica, an ingress, a request on its way.

What happens per step or per token is kept in plain Python and published twice a second: a write to a shared
series takes about a microsecond, and a model has hundreds of them.
"""

from __future__ import annotations

import time

from prometheus_client import Counter

from engine.metrics import EngineStats
from engine.msa.plan import IndexPlan, Role
from engine.types import EngineInfo, FinishReason
from service import metrics
from service.metrics import Histogram
from service.routing import Choice

# A busy engine publishes this often, an idle one at once.
PUBLISH_PERIOD_S = 0.5
COMPLETIONS_ROUTE = "/v1/completions"
COMMON_STATUSES = ("200", "400", "404", "408", "429", "500", "503")
COMMON_REFUSALS = (
    *("engine_overloaded", "engine_unavailable", "internal_error", "generation_failed"),
    *("context_length_exceeded", "invalid_value", "invalid_type", "model_not_found", "deadline_exceeded"),
)


class CpuSeries:
    """The CPU time of this process, as a counter that `update` brings up to date. process: "ingress" or "engine"."""

    def __init__(self, process: str) -> None:
        self._counter = metrics.PROCESS_CPU.labels(process)
        self._last_s = 0.0

    def update(self) -> None:
        """Add what was used since the last call, all threads included."""
        now_s = time.process_time()
        self._counter.inc(now_s - self._last_s)
        self._last_s = now_s


class _Growth:
    """Adds to counters by what a sum has grown since it was last seen."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self._children: dict[tuple[Counter, tuple[str, ...]], Counter] = {}
        self._last: dict[tuple[Counter, tuple[str, ...]], float] = {}

    def grow(self, metric: Counter, total: float, *more_labels: str) -> None:
        key = (metric, more_labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*self._labels, *more_labels)
            self._last[key] = 0.0
        if total != self._last[key]:
            child.inc(total - self._last[key])
            self._last[key] = total


class EngineSeries:
    """The series of one engine replica, made from its EngineStats.

    engine: the replica's slot.  load_s: what its start took.
    """

    def __init__(self, model_name: str, engine: str, info: EngineInfo, *, load_s: float) -> None:
        labels = (model_name, engine)
        self._growth = _Growth(labels)
        self._published_s = 0.0
        self._gauges = {
            "num_running": metrics.REQUESTS_RUNNING.labels(*labels),
            "num_waiting": metrics.REQUESTS_WAITING.labels(*labels),
            "kv_usage": metrics.KV_CACHE_USAGE.labels(*labels),
            "held_pages": metrics.KV_PAGES.labels(*labels, "held"),
            "cached_pages": metrics.KV_PAGES.labels(*labels, "cached"),
            "blank_pages": metrics.KV_PAGES.labels(*labels, "blank"),
            "guard_active": metrics.INDEX_GUARD_ACTIVE.labels(*labels),
        }
        self._plans = [metrics.INDEX_PLAN_ACTIVE.labels(*labels, info.plan)]
        if info.fallback_plan is not None:
            self._plans.append(metrics.INDEX_PLAN_ACTIVE.labels(*labels, info.fallback_plan))
        self._histograms: dict[str, Histogram] = {
            "queue_s": metrics.REQUEST_QUEUE_TIME.labels(*labels),
            "prefill_s": metrics.REQUEST_PREFILL_TIME.labels(*labels),
            "decode_s": metrics.REQUEST_DECODE_TIME.labels(*labels),
            "prompt_tokens": metrics.REQUEST_PROMPT_TOKENS.labels(*labels),
            "generation_tokens": metrics.REQUEST_GENERATION_TOKENS.labels(*labels),
            "step_s": metrics.ENGINE_STEP.labels(*labels),
            "step_tokens": metrics.ITERATION_TOKENS.labels(*labels),
            "batch_size": metrics.ITERATION_REQUESTS.labels(*labels),
        }
        self._open = metrics.OPEN_REQUESTS.labels(*labels)
        self._load = metrics.ENGINE_LOAD.labels(*labels)
        self._deaths = metrics.ENGINE_DEATHS.labels(*labels)
        self._dropped_controls = metrics.DROPPED_MESSAGES.labels(model_name, "control")
        self._dropped_replies = metrics.DROPPED_MESSAGES.labels(model_name, "replies")
        self._num_dropped_replies = 0
        self._num_open = 0
        self._cpu = CpuSeries("engine")
        self._open.set(0)
        self._load.set(0)
        self._describe(labels, info, load_s)
        # Every series is there from the start, at 0: a rate needs a value to grow from.
        self.publish(EngineStats(blank_pages=info.num_pages))

    def _describe(self, labels: tuple[str, str], info: EngineInfo, load_s: float) -> None:
        metrics.ENGINE_INFO.labels(*labels, info.plan, info.backend, info.dtype, str(info.tensor_parallel_size)).set(1)
        sizes = (info.num_pages, info.page_size, info.page_bytes, info.max_model_len)
        metrics.CACHE_CONFIG_INFO.labels(*labels, *map(str, sizes)).set(1)
        metrics.KV_CACHE_BYTES.labels(*labels).set(info.num_pages * info.page_bytes)
        metrics.WEIGHT_BYTES.labels(*labels).set(info.weight_bytes)
        metrics.ENGINE_START_TIME.labels(*labels).set(time.time())
        metrics.ENGINE_LOAD_SECONDS.labels(*labels).set(load_s)
        plan = IndexPlan.parse(info.plan)
        for layer_id, role in enumerate(plan.roles):
            source = "" if role is Role.DENSE else str(plan.source(layer_id))
            metrics.INDEX_LAYER_INFO.labels(*labels, str(layer_id), role.name.lower(), source).set(1)
            if role is not Role.DENSE:
                self._growth.grow(metrics.INDEX_SELECTIONS, 0, str(layer_id), role.name.lower())
            if role is Role.REUSE and info.fallback_plan is not None:
                self._growth.grow(metrics.INDEX_SELECTIONS, 0, str(layer_id), Role.COMPUTE.name.lower())

    def update(self, stats: EngineStats, *, dropped_replies: int = 0) -> None:
        """Publish what changed, if it is time to. Called after each step by the thread that owns `stats`.

        dropped_replies: messages on the executor's socket that were not let in, since its start.
        """
        is_busy = stats.num_running or stats.num_waiting
        if not is_busy or time.monotonic() - self._published_s >= PUBLISH_PERIOD_S:
            self.publish(stats, dropped_replies=dropped_replies)

    def publish(self, stats: EngineStats, *, dropped_replies: int = 0) -> None:
        """As `update`, whether it is time to or not."""
        self._published_s = time.monotonic()
        self._cpu.update()
        self._dropped_replies.inc(dropped_replies - self._num_dropped_replies)
        self._num_dropped_replies = dropped_replies
        self._publish_counters(stats)
        self._publish_layers(stats)
        observations = stats.drain()
        for name, histogram in self._histograms.items():
            histogram.observe_many(getattr(observations, name))
        # Last: who sees an idle engine sees all that it did.
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))
        for is_fallback, plan in enumerate(self._plans):
            plan.set(is_fallback == stats.guard_active)

    def _publish_counters(self, stats: EngineStats) -> None:
        grow = self._growth.grow
        grow(metrics.PROMPT_TOKENS, stats.computed_prompt_tokens)
        grow(metrics.GENERATION_TOKENS, stats.generation_tokens)
        grow(metrics.SCHEDULED_TOKENS, stats.prefill_tokens, "prefill")
        grow(metrics.SCHEDULED_TOKENS, stats.decode_tokens, "decode")
        grow(metrics.PREEMPTIONS, stats.preemptions)
        grow(metrics.PAGE_EVICTIONS, stats.page_evictions)
        grow(metrics.PREFIX_CACHE_QUERIES, stats.prefix_queries_tokens)
        grow(metrics.PREFIX_CACHE_HITS, stats.prefix_hits_tokens)
        grow(metrics.PLAN_SECONDS, stats.plan_s)
        grow(metrics.FORWARD_SECONDS, stats.forward_s)
        grow(metrics.PYTHON_SECONDS, stats.python_s)
        grow(metrics.INDEX_GUARD_TRIPS, stats.guard_trips)
        grow(metrics.PAGE_CHECK_FAILURES, stats.page_check_failures)
        grow(metrics.NOT_FINITE, stats.not_finite)
        grow(metrics.NOT_GUIDED, stats.not_guided)
        grow(metrics.GUIDED_TOKENS, stats.guided_tokens)
        grow(metrics.MASK_SECONDS, stats.mask_s)
        for rank, times in stats.ranks.items():
            grow(metrics.RANK_FORWARD_SECONDS, times.forward_s, str(rank))
            grow(metrics.RANK_COLLECTIVE_SECONDS, times.collective_s, str(rank))
            grow(metrics.RANK_SAMPLES, times.samples, str(rank))

    def _publish_layers(self, stats: EngineStats) -> None:
        for metric, by_phase in (
            (metrics.INDEXER_SECONDS, stats.indexer_s),
            (metrics.INDEXER_SAMPLES, stats.indexer_samples),
            (metrics.SPARSE_ATTENTION_SECONDS, stats.sparse_attention_s),
            (metrics.SPARSE_ATTENTION_SAMPLES, stats.sparse_attention_samples),
        ):
            for (layer_id, phase), value in by_phase.items():
                self._growth.grow(metric, value, str(layer_id), phase)
        for metric, by_layer, more in (
            (metrics.INDEX_SELECTIONS, stats.selections_computed, ("compute",)),
            (metrics.INDEX_SELECTIONS, stats.selections_reused, ("reuse",)),
            (metrics.INDEX_OVERLAP_SUM, stats.overlap_sum, ()),
            (metrics.INDEX_OVERLAP_COUNT, stats.overlap_count, ()),
        ):
            for layer_id, value in by_layer.items():
                self._growth.grow(metric, value, str(layer_id), *more)

    def set_open_requests(self, count: int) -> None:
        """How many requests ingresses wait for. Not the scheduler's word: it may be stuck."""
        if count != self._num_open:
            self._num_open = count
            self._open.set(count)

    def set_load(self, share: float) -> None:
        """How full the replica is; 1: full."""
        self._load.set(share)

    def count_death(self) -> None:
        """The worker group was lost."""
        self._deaths.inc()

    def count_dropped_message(self) -> None:
        """A message on the control socket was not let in."""
        self._dropped_controls.inc()


class IngressSeries:
    """The series that an ingress process writes. One per process."""

    def __init__(self, model_name: str, *, configured_replicas: int) -> None:
        self._model_name = model_name
        self._ttft = metrics.TIME_TO_FIRST_TOKEN.labels(model_name)
        self._inter_token = metrics.INTER_TOKEN_LATENCY.labels(model_name)
        self._per_token = metrics.TIME_PER_OUTPUT_TOKEN.labels(model_name)
        self._e2e = metrics.E2E_REQUEST_LATENCY.labels(model_name)
        self._delivered = metrics.DELIVERED_TOKENS.labels(model_name)
        self._tokenize = metrics.TOKENIZE_SECONDS.labels(model_name)
        self._grammar = metrics.GRAMMAR_SECONDS.labels(model_name)
        self._grammars = {hit: metrics.GRAMMARS.labels(model_name, "hit" if hit else "miss") for hit in (True, False)}
        self._submit = metrics.SUBMIT_REQUESTS.labels(model_name)
        self._failover = metrics.FAILOVER_SECONDS.labels(model_name)
        self._given_up = metrics.GIVEN_UP.labels(model_name)
        self._not_accepted = metrics.NOT_ACCEPTED.labels(model_name)
        self._token_mismatches = metrics.TOKEN_MISMATCHES.labels(model_name)
        self._dropped = metrics.DROPPED_MESSAGES.labels(model_name, "events")
        self._failovers = {
            cause: metrics.FAILOVERS.labels(model_name, cause) for cause in ("replica_lost", "events_lost")
        }
        self._routed = {choice: metrics.ROUTED_REQUESTS.labels(model_name, choice) for choice in Choice}
        self._ended = {
            reason.value: metrics.REQUEST_SUCCESS.labels(model_name, reason.value) for reason in FinishReason
        }
        # From 0 on: the first of its kind would otherwise appear as 1, and no rate would see it grow.
        for code in COMMON_REFUSALS:
            metrics.REFUSALS.labels(model_name, code)
        for status in COMMON_STATUSES:
            metrics.HTTP_REQUESTS.labels(COMPLETIONS_ROUTE, status)
        metrics.CONFIGURED_REPLICAS.labels(model_name).set(configured_replicas)
        metrics.INGRESS_REPLICAS.labels(model_name).set(1)
        self._gaps_s: list[float] = []
        self._num_delivered_tokens = 0

    def timer(self) -> RequestTimer:
        """Start to time one request, or one choice of it, now."""
        return RequestTimer(self)

    def publish(self) -> None:
        """Write what the streams gathered; called now and then, and when a request ends."""
        self._inter_token.observe_many(self._gaps_s)
        self._gaps_s.clear()
        self._delivered.inc(self._num_delivered_tokens)
        self._num_delivered_tokens = 0

    def count_failover(self, cause: str) -> None:
        """A request moves to another replica. cause: replica_lost or events_lost."""
        self._failovers[cause].inc()

    def observe_failover(self, seconds: float) -> None:
        """A stream that had lost its replica goes on."""
        self._failover.observe(seconds)

    def count_routed(self, choice: Choice) -> None:
        """A replica was chosen for a request."""
        self._routed[choice].inc()

    def count_given_up(self) -> None:
        """A request was resubmitted as often as allowed."""
        self._given_up.inc()

    def count_not_accepted(self) -> None:
        """A submit has to be sent again: no replica accepted it."""
        self._not_accepted.inc()

    def count_token_mismatches(self, num_requests: int) -> None:
        """Requests were delivered with another number of tokens than their replica counted."""
        if num_requests:
            self._token_mismatches.inc(num_requests)

    def count_refusal(self, code: str) -> None:
        """A request was not run. code: the machine-readable code of the error, from our fixed set."""
        metrics.REFUSALS.labels(self._model_name, code).inc()

    def count_dropped_message(self) -> None:
        """A message on the event socket was not let in."""
        self._dropped.inc()

    def observe_submit(self, num_requests: int) -> None:
        """A submit left for a replica."""
        self._submit.observe(num_requests)

    def count_grammar(self, *, hit: bool) -> None:
        """A request's text has to match a grammar. hit: it was compiled already."""
        self._grammars[hit].inc()

    def observe_grammar(self, seconds: float) -> None:
        """A grammar was compiled."""
        self._grammar.observe(seconds)

    def observe_tokenize(self, seconds: float) -> None:
        """The texts of one HTTP request were encoded."""
        self._tokenize.observe(seconds)


class RequestTimer:
    """Times one choice as its client sees it. Made by IngressSeries.timer when the request arrives."""

    def __init__(self, series: IngressSeries) -> None:
        self._series = series
        self._arrival_s = time.monotonic()
        self._first_send_s: float | None = None
        self._last_send_s = 0.0
        self._num_tokens = 0
        self._num_first_tokens = 0

    def sent(self, num_tokens: int) -> None:
        """Bytes of the choice were handed to the client's connection. num_tokens: the choice's, so far."""
        now_s = time.monotonic()
        if self._first_send_s is None:
            self._first_send_s = now_s
            self._num_first_tokens = num_tokens
            self._series._ttft.observe(now_s - self._arrival_s)
        else:
            self._series._gaps_s.append(now_s - self._last_send_s)
        self._last_send_s = now_s
        self._series._num_delivered_tokens += num_tokens - self._num_tokens
        self._num_tokens = num_tokens

    def finished(self, reason: str) -> None:
        """The last bytes were sent. reason: stop, length, abort or error."""
        series = self._series
        series.publish()
        later_tokens = self._num_tokens - self._num_first_tokens
        if self._first_send_s is not None and later_tokens > 0:
            series._per_token.observe((self._last_send_s - self._first_send_s) / later_tokens)
        series._e2e.observe(time.monotonic() - self._arrival_s)
        series._ended[reason].inc()
