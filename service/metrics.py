"""Every Prometheus series of m3serve, declared once: CATALOG. Names follow vLLM's, with the prefix `m3_`.

The processes of a node share one directory (PROMETHEUS_MULTIPROC_DIR, set for the deployments by `service.app`);
service/exporter.py merges and serves it, service/series.py writes. Skip rates, hit rates and means are PromQL over
counters: ratios of ratios do not aggregate. Series of an engine replica carry its slot (0..replicas-1), so that a
replacement goes on with them. deploy/METRICS.md is made from CATALOG.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import Counter, Gauge
from prometheus_client import Histogram as _PlainHistogram

from service import series_files

# Before the first series is made: from then on the exporter sees this process's life.
series_files.claim_from_environment()

_ENGINE = ("model_name", "engine")
_MODEL = ("model_name",)
_LAYER = (*_ENGINE, "layer")
_LAYER_PHASE = (*_LAYER, "phase")
_RANK = (*_ENGINE, "rank")

_LONG_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKEN_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24)
_ENCODE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Histogram(_PlainHistogram):
    """A histogram that can take many values at once: one write per bucket that they hit, not two per value."""

    def observe_many(self, values: Sequence[float]) -> None:
        """Observe each of `values`."""
        if not values:
            return
        counts: dict[int, int] = {}
        for value in values:
            index = bisect_left(self._upper_bounds, value)
            counts[index] = counts.get(index, 0) + 1
        self._sum.inc(sum(values))
        for index, count in counts.items():
            self._buckets[index].inc(count)


@dataclass(frozen=True, slots=True)
class Series:
    """One row of the catalog. kind: counter, gauge or histogram.  unit: of the value; of each observation."""

    group: str
    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    meaning: str
    metric: Any


CATALOG: list[Series] = []
M = TypeVar("M", Counter, Gauge, Histogram)


@dataclass(frozen=True, slots=True)
class _Group:
    """Declares the series of one part of the service."""

    title: str

    def counter(self, name: str, unit: str, meaning: str, labels: tuple[str, ...]) -> Counter:
        return self._add("counter", name, unit, meaning, labels, Counter(name, meaning, labels))

    def gauge(self, name: str, unit: str, meaning: str, labels: tuple[str, ...], mode: Any = "mostrecent") -> Gauge:
        """mode: how the gauges of several processes become one; those of dead processes are gone."""
        return self._add("gauge", name, unit, meaning, labels, Gauge(name, meaning, labels, multiprocess_mode=mode))

    def histogram(
        self, name: str, unit: str, meaning: str, labels: tuple[str, ...], buckets: Sequence[float]
    ) -> Histogram:
        return self._add("histogram", name, unit, meaning, labels, Histogram(name, meaning, labels, buckets=buckets))

    def _add(self, kind: str, name: str, unit: str, meaning: str, labels: tuple[str, ...], metric: M) -> M:
        CATALOG.append(Series(self.title, name, kind, unit, labels, meaning, metric))
        return metric


_client = _Group("Seen by the client: observed once, in the ingress, when bytes go out")
TIME_TO_FIRST_TOKEN = _client.histogram(
    "m3_time_to_first_token_seconds", "seconds", "From the request's arrival to its first bytes", _MODEL, _TTFT_S
)
INTER_TOKEN_LATENCY = _client.histogram(
    "m3_inter_token_latency_seconds", "seconds", "Between two sends of tokens of one stream", _MODEL, _TOKEN_S
)
TIME_PER_OUTPUT_TOKEN = _client.histogram(
    "m3_request_time_per_output_token_seconds",
    "seconds",
    "Of a request that streamed: from its first bytes to its last, per token after the first send",
    _MODEL,
    _TOKEN_S,
)
E2E_REQUEST_LATENCY = _client.histogram(
    "m3_e2e_request_latency_seconds", "seconds", "From the request's arrival to its last bytes", _MODEL, _LONG_S
)
REQUEST_SUCCESS = _client.counter(
    "m3_request_success_total",
    "requests",
    "Requests that ended, by reason: stop, length, abort (the client left) or error",
    (*_MODEL, "finished_reason"),
)
DELIVERED_TOKENS = _client.counter(
    "m3_delivered_tokens_total", "tokens", "Generated tokens in the answers that clients were sent", _MODEL
)
HTTP_REQUESTS = _client.counter("m3_http_requests_total", "responses", "HTTP answers that began", ("route", "status"))
HTTP_IN_FLIGHT = _client.gauge(
    "m3_http_requests_in_flight", "requests", "HTTP requests that are being answered", (), mode="livesum"
)

_ingress = _Group("Ingress: refusals, failover, the way to the engines")
REFUSALS = _ingress.counter(
    "m3_refusals_total", "requests", "Requests that were not run, by error code", (*_MODEL, "code")
)
FAILOVERS = _ingress.counter(
    "m3_failovers_total",
    "requests",
    "Requests resubmitted, by cause: replica_lost, or events_lost (a gap between the replica's account and what came)",
    (*_MODEL, "cause"),
)
FAILOVER_SECONDS = _ingress.histogram(
    "m3_failover_seconds",
    "seconds",
    "From the loss of a request's replica to the next token from another one",
    _MODEL,
    _LONG_S,
)
GIVEN_UP = _ingress.counter(
    "m3_failovers_given_up_total", "requests", "Requests that ended in an error after retry_limit resubmissions", _MODEL
)
NOT_ACCEPTED = _ingress.counter(
    "m3_submits_not_accepted_total",
    "calls",
    "Submits sent again since the replica they reached was about to end, or none accepted them in time",
    _MODEL,
)
TOKEN_MISMATCHES = _ingress.counter(
    "m3_token_mismatches_total",
    "requests",
    "Requests that ended with another number of tokens than their replica counted; always 0 but for a bug",
    _MODEL,
)
TOKENIZE_SECONDS = _ingress.histogram(
    "m3_tokenize_seconds", "seconds", "Encoding the text prompts of one HTTP request", _MODEL, _ENCODE_S
)
GRAMMAR_SECONDS = _ingress.histogram(
    "m3_grammar_compile_seconds", "seconds", "Compiling a grammar that was not known, to see if it is valid", _MODEL,
    _ENCODE_S,
)  # fmt: skip
GRAMMARS = _ingress.counter(
    "m3_grammars_total",
    "requests",
    "Requests whose text has to match a grammar: hit, it was compiled already; miss",
    (*_MODEL, "cache"),
)
SUBMIT_REQUESTS = _ingress.histogram(
    "m3_submit_requests", "requests", "Requests that left in one submit to a replica", _MODEL, _BATCH
)
ROUTED_REQUESTS = _ingress.counter(
    "m3_routed_requests_total",
    "requests",
    "Requests for which an engine replica was chosen: prefix, since it holds the longest known prefix; overloaded, not "
    "that one, since it had too much to do; balanced, the least loaded, since none holds a prefix",
    (*_MODEL, "choice"),
)
CONFIGURED_REPLICAS = _ingress.gauge(
    "m3_configured_engine_replicas",
    "replicas",
    "Engine replicas that the settings ask for; with autoscaling, at least",
    _MODEL,
    mode="livemax",
)
INGRESS_REPLICAS = _ingress.gauge(
    "m3_ingress_replicas", "processes", "HTTP front processes that live", _MODEL, mode="livesum"
)
DROPPED_MESSAGES = _ingress.counter(
    "m3_dropped_messages_total",
    "messages",
    "Socket messages with a wrong token or form, by socket: events (ingress), control or replies (engine replica)",
    (*_MODEL, "socket"),
)
PROCESS_CPU = _ingress.counter(
    "m3_process_cpu_seconds_total", "seconds", "CPU time of the processes on the token path", ("process",)
)

_requests = _Group("Engine: requests")
REQUEST_QUEUE_TIME = _requests.histogram(
    "m3_request_queue_time_seconds", "seconds", "From the engine's queue to the first step", _ENGINE, _LONG_S
)
REQUEST_PREFILL_TIME = _requests.histogram(
    "m3_request_prefill_time_seconds", "seconds", "From the first step to the first token", _ENGINE, _LONG_S
)
REQUEST_DECODE_TIME = _requests.histogram(
    "m3_request_decode_time_seconds", "seconds", "From the first token to the last", _ENGINE, _LONG_S
)
REQUEST_PROMPT_TOKENS = _requests.histogram(
    "m3_request_prompt_tokens", "tokens", "Prompt length of requests that ended", _ENGINE, _TOKENS
)
REQUEST_GENERATION_TOKENS = _requests.histogram(
    "m3_request_generation_tokens", "tokens", "Tokens that a request had generated when it ended", _ENGINE, _TOKENS
)
PROMPT_TOKENS = _requests.counter(
    "m3_prompt_tokens_total", "tokens", "Prompt tokens computed, again after a preemption", _ENGINE
)
GENERATION_TOKENS = _requests.counter("m3_generation_tokens_total", "tokens", "Tokens sampled", _ENGINE)
OPEN_REQUESTS = _requests.gauge(
    "m3_engine_open_requests",
    "requests",
    "Requests that ingresses wait for at this replica; written when they arrive and end, whatever the scheduler does",
    _ENGINE,
)
ENGINE_LOAD = _requests.gauge(
    "m3_engine_load",
    "ratio",
    "Tokens of open requests per target_tokens_per_replica, or open requests per max_num_seqs if that is more; 1: "
    "full. Autoscaling wants as many replicas as the sum over them",
    _ENGINE,
)

_steps = _Group("Engine: scheduler and steps")
REQUESTS_RUNNING = _steps.gauge("m3_num_requests_running", "requests", "Requests in the running batch", _ENGINE)
REQUESTS_WAITING = _steps.gauge(
    "m3_num_requests_waiting", "requests", "Requests that wait for a slot or pages", _ENGINE
)
ENGINE_STEP = _steps.histogram(
    "m3_engine_step_seconds", "seconds", "One engine step, planning included", _ENGINE, _STEP_S
)
ITERATION_TOKENS = _steps.histogram("m3_iteration_tokens", "tokens", "Tokens computed in one step", _ENGINE, _TOKENS)
ITERATION_REQUESTS = _steps.histogram("m3_iteration_requests", "requests", "Requests in one step", _ENGINE, _BATCH)
SCHEDULED_TOKENS = _steps.counter(
    "m3_scheduled_tokens_total", "tokens", "Tokens computed, in prefill or decode rows", (*_ENGINE, "phase")
)
PREEMPTIONS = _steps.counter("m3_num_preemptions_total", "requests", "Requests preempted for want of pages", _ENGINE)
PLAN_SECONDS = _steps.counter("m3_plan_seconds_total", "seconds", "Scheduler: planning the steps", _ENGINE)
FORWARD_SECONDS = _steps.counter("m3_forward_seconds_total", "seconds", "Rank 0: in the model", _ENGINE)
GUIDED_TOKENS = _steps.counter("m3_guided_tokens_total", "tokens", "Sampled under the mask of a grammar", _ENGINE)
MASK_SECONDS = _steps.counter(
    "m3_guided_mask_seconds_total",
    "seconds",
    "Rank 0: making the masks of grammars; on a GPU while the device is in the model",
    _ENGINE,
)
PYTHON_SECONDS = _steps.counter("m3_python_seconds_total", "seconds", "Rank 0: around the model", _ENGINE)

_pages = _Group("Engine: pages and prefix cache")
KV_CACHE_USAGE = _pages.gauge(
    "m3_kv_cache_usage_perc", "ratio", "Share of KV pages that requests hold, 0 to 1", _ENGINE
)
KV_PAGES = _pages.gauge(
    "m3_kv_pages",
    "pages",
    "KV pages by state: held (by requests), cached (nobody's, but findable) or blank",
    (*_ENGINE, "state"),
)
PAGE_EVICTIONS = _pages.counter(
    "m3_page_evictions_total", "pages", "Cached pages given to new tokens: their prefix is lost", _ENGINE
)
PREFIX_CACHE_QUERIES = _pages.counter(
    "m3_prefix_cache_queries_total", "tokens", "Tokens looked up in the prefix cache", _ENGINE
)
PREFIX_CACHE_HITS = _pages.counter("m3_prefix_cache_hits_total", "tokens", "Tokens found in the prefix cache", _ENGINE)
KV_CACHE_BYTES = _pages.gauge("m3_kv_cache_bytes", "bytes", "KV and index-K pages of one rank, all layers", _ENGINE)
CACHE_CONFIG_INFO = _pages.gauge(
    "m3_cache_config_info",
    "constant 1",
    "How large the KV cache is",
    (*_ENGINE, "num_pages", "page_size", "page_bytes", "max_model_len"),
)

_replica = _Group("Engine: replica and ranks")
ENGINE_INFO = _replica.gauge(
    "m3_engine_info",
    "constant 1",
    "What runs. plan: one letter per layer, D dense, F selects, S reuses",
    (*_ENGINE, "plan", "backend", "dtype", "tensor_parallel_size"),
)
ENGINE_START_TIME = _replica.gauge(
    "m3_engine_start_time_seconds", "seconds", "When the replica became ready, Unix time", _ENGINE
)
ENGINE_LOAD_SECONDS = _replica.gauge(
    "m3_engine_load_seconds", "seconds", "Start of the worker group and loading of the weights", _ENGINE
)
ENGINE_DEATHS = _replica.counter(
    "m3_engine_deaths_total", "replicas", "Worker groups lost: a rank died, hung or failed", _ENGINE
)
PAGE_CHECK_FAILURES = _replica.counter(
    "m3_page_check_failures_total",
    "replicas",
    "Idle engines that ended since their page accounting did not balance; always 0 but for a bug",
    _ENGINE,
)
NOT_FINITE = _replica.counter(
    "m3_requests_not_finite_total",
    "requests",
    "Requests that ended in an error since their logits held a NaN or an infinity",
    _ENGINE,
)
NOT_GUIDED = _replica.counter(
    "m3_requests_not_guided_total",
    "requests",
    "Requests that ended in an error since their grammar got too complex to go on",
    _ENGINE,
)
WEIGHT_BYTES = _replica.gauge("m3_weight_bytes", "bytes", "Weights of rank 0", _ENGINE)
RANK_FORWARD_SECONDS = _replica.counter(
    "m3_rank_forward_seconds_total", "seconds", "Each rank in the model, on probed steps", _RANK
)
RANK_COLLECTIVE_SECONDS = _replica.counter(
    "m3_rank_collective_seconds_total",
    "seconds",
    "Of that, in collectives: the rank that waits least is the one that the others wait for",
    _RANK,
)
RANK_SAMPLES = _replica.counter("m3_rank_samples_total", "steps", "Probed steps of each rank", _RANK)

_index = _Group("Index cache: measured in the model, on rank 0")
INDEXER_SECONDS = _index.counter(
    "m3_indexer_seconds_total", "seconds", "Score and top-k, on probed steps", _LAYER_PHASE
)
INDEXER_SAMPLES = _index.counter("m3_indexer_samples_total", "calls", "Probed calls of the indexer", _LAYER_PHASE)
SPARSE_ATTENTION_SECONDS = _index.counter(
    "m3_sparse_attention_seconds_total", "seconds", "Sparse attention, on probed steps", _LAYER_PHASE
)
SPARSE_ATTENTION_SAMPLES = _index.counter(
    "m3_sparse_attention_samples_total", "calls", "Probed calls of sparse attention", _LAYER_PHASE
)
INDEX_SELECTIONS = _index.counter(
    "m3_index_selections_total",
    "selections",
    "Selections that a layer made (role compute) or read from the layer above (role reuse), counted where it happens",
    (*_LAYER, "role"),
)
INDEX_OVERLAP_SUM = _index.counter(
    "m3_index_overlap_sum_total",
    "ratio",
    "Audit of reuse layers: sum of |fresh and reused| / |fresh| over (token, index head), the forced blocks included; "
    "while the guard is active, of what reuse would have given",
    _LAYER,
)
INDEX_OVERLAP_COUNT = _index.counter(
    "m3_index_overlap_count_total",
    "pairs",
    "Audit of reuse layers: (token, index head) pairs that had more blocks than they could select",
    _LAYER,
)
INDEX_GUARD_ACTIVE = _index.gauge(
    "m3_index_guard_active",
    "0 or 1",
    "Whether the audit's guard has every sparse layer select for itself, since overlaps were below audit_overlap_floor",
    _ENGINE,
)
INDEX_GUARD_TRIPS = _index.counter(
    "m3_index_guard_trips_total", "trips", "How often the audit's guard became active", _ENGINE
)
INDEX_PLAN_ACTIVE = _index.gauge(
    "m3_index_plan_active",
    "0 or 1",
    "1 for the plan by which steps run: that of m3_engine_info, or while the guard is active the one without an S",
    (*_ENGINE, "plan"),
)
INDEX_LAYER_INFO = _index.gauge(
    "m3_index_layer_info",
    "constant 1",
    "The configured plan by layer. role: dense, compute or reuse. source: the layer whose selection it attends with",
    (*_LAYER, "role", "source"),
)
