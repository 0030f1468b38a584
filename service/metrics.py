"""Every Prometheus series of m3serve, declared once. Names follow vLLM's, with the prefix `m3_`.

The processes of a node share one directory (PROMETHEUS_MULTIPROC_DIR, set for the deployments by `service.app`);
service/exporter.py merges and serves it. Skip rates, hit rates and means are PromQL over counters: ratios of ratios
do not aggregate. Gauges of an engine replica carry its slot (0..replicas-1), so a replacement takes over its series.
"""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram

from engine.metrics import EngineStats
from engine.types import EngineInfo

_ENGINE = ("model_name", "engine")
_MODEL = ("model_name",)
_LONG_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

# --- seen by the client: observed once, in the ingress, when bytes go out --------------------------------------

TIME_TO_FIRST_TOKEN = Histogram(
    "m3_time_to_first_token_seconds", "From the request's arrival to its first bytes", _MODEL, buckets=_TTFT_S
)
INTER_TOKEN_LATENCY = Histogram(
    "m3_inter_token_latency_seconds", "Between two sends of tokens of one stream", _MODEL, buckets=_TOKEN_S
)
E2E_REQUEST_LATENCY = Histogram(
    "m3_e2e_request_latency_seconds", "From the request's arrival to its last bytes", _MODEL, buckets=_LONG_S
)
REQUEST_SUCCESS = Counter("m3_request_success_total", "Requests that ended, by reason", (*_MODEL, "finished_reason"))
HTTP_REQUESTS = Counter("m3_http_requests_total", "HTTP responses", ("route", "status"))
PROCESS_CPU = Counter("m3_process_cpu_seconds_total", "CPU time of the processes on the token path", ("process",))
FAILOVERS = Counter("m3_failovers_total", "Requests resubmitted after their replica was lost", _MODEL)
REFUSALS = Counter("m3_refusals_total", "Requests that were not run, by error code", (*_MODEL, "code"))

# --- measured in the engine -------------------------------------------------------------------------------------

REQUEST_QUEUE_TIME = Histogram(
    "m3_request_queue_time_seconds", "From the engine's queue to the first step", _ENGINE, buckets=_LONG_S
)
REQUEST_PREFILL_TIME = Histogram(
    "m3_request_prefill_time_seconds", "From the first step to the first token", _ENGINE, buckets=_LONG_S
)
REQUEST_DECODE_TIME = Histogram(
    "m3_request_decode_time_seconds", "From the first token to the last", _ENGINE, buckets=_LONG_S
)
REQUEST_PROMPT_TOKENS = Histogram("m3_request_prompt_tokens", "Prompt length", _ENGINE, buckets=_TOKENS)
REQUEST_GENERATION_TOKENS = Histogram(
    "m3_request_generation_tokens", "Tokens that a request generated", _ENGINE, buckets=_TOKENS
)
ENGINE_STEP = Histogram("m3_engine_step_seconds", "One engine step, planning included", _ENGINE, buckets=_STEP_S)
ITERATION_TOKENS = Histogram("m3_iteration_tokens", "Tokens computed in one step", _ENGINE, buckets=_TOKENS)
ITERATION_REQUESTS = Histogram("m3_iteration_requests", "Requests in one step", _ENGINE, buckets=_BATCH)
PROMPT_TOKENS = Counter("m3_prompt_tokens_total", "Prompt tokens computed", _ENGINE)
GENERATION_TOKENS = Counter("m3_generation_tokens_total", "Tokens generated", _ENGINE)
PREEMPTIONS = Counter("m3_num_preemptions_total", "Requests preempted for want of pages", _ENGINE)
PREFIX_CACHE_QUERIES = Counter("m3_prefix_cache_queries_total", "Tokens looked up in the prefix cache", _ENGINE)
PREFIX_CACHE_HITS = Counter("m3_prefix_cache_hits_total", "Tokens found in the prefix cache", _ENGINE)
FORWARD_SECONDS = Counter("m3_forward_seconds_total", "Time of rank 0 in the model", _ENGINE)
PYTHON_SECONDS = Counter("m3_python_seconds_total", "Time of rank 0 around the model", _ENGINE)
DROPPED_MESSAGES = Counter("m3_dropped_messages_total", "Socket messages with a wrong token or form", _ENGINE)
REQUESTS_RUNNING = Gauge(
    "m3_num_requests_running", "Requests in the running batch", _ENGINE, multiprocess_mode="mostrecent"
)
REQUESTS_WAITING = Gauge(
    "m3_num_requests_waiting", "Requests that wait for a slot or pages", _ENGINE, multiprocess_mode="mostrecent"
)
KV_CACHE_USAGE = Gauge(
    "m3_kv_cache_usage_perc", "Share of KV pages in use, 0 to 1", _ENGINE, multiprocess_mode="mostrecent"
)
ENGINE_INFO = Gauge(
    "m3_engine_info",
    "Constant 1; its labels say what runs. plan: one letter per layer",
    (*_ENGINE, "plan", "backend", "dtype", "tensor_parallel_size"),
    multiprocess_mode="mostrecent",
)
CACHE_CONFIG_INFO = Gauge(
    "m3_cache_config_info",
    "Constant 1; its labels say how large the KV cache is",
    (*_ENGINE, "num_pages", "page_size", "page_bytes", "max_model_len"),
    multiprocess_mode="mostrecent",
)

# --- measured in the model, on rank 0 ----------------------------------------------------------------------------

INDEXER_SECONDS = Counter("m3_indexer_seconds_total", "Score and top-k on probed steps", (*_ENGINE, "layer", "phase"))
INDEXER_SAMPLES = Counter("m3_indexer_samples_total", "Probed calls of the indexer", (*_ENGINE, "layer", "phase"))
SPARSE_ATTENTION_SECONDS = Counter(
    "m3_sparse_attention_seconds_total", "Sparse attention on probed steps", (*_ENGINE, "layer", "phase")
)
SPARSE_ATTENTION_SAMPLES = Counter(
    "m3_sparse_attention_samples_total", "Probed calls of sparse attention", (*_ENGINE, "layer", "phase")
)
INDEX_SELECTIONS = Counter(
    "m3_index_selections_total", "Selections that a layer computed or reused", (*_ENGINE, "layer", "role")
)
INDEX_OVERLAP_SUM = Counter(
    "m3_index_overlap_sum_total",
    "Audit of reuse layers: sum of |fresh and reused| / |fresh| over (token, index head)",
    (*_ENGINE, "layer"),
)
INDEX_OVERLAP_COUNT = Counter(
    "m3_index_overlap_count_total", "Audit of reuse layers: (token, index head) pairs", (*_ENGINE, "layer")
)


class CpuSeries:
    """The CPU time of this process, as a counter that `update` brings up to date. process: "ingress" or "engine"."""

    def __init__(self, process: str) -> None:
        self._counter = PROCESS_CPU.labels(process)
        self._last_s = 0.0

    def update(self) -> None:
        """Add what was used since the last call, all threads included."""
        now_s = time.process_time()
        self._counter.inc(now_s - self._last_s)
        self._last_s = now_s


class EngineSeries:
    """The series of one engine replica; `update` turns the growth of its EngineStats into theirs."""

    def __init__(self, model_name: str, engine: str, info: EngineInfo) -> None:
        self._labels = (model_name, engine)
        labels = self._labels
        ENGINE_INFO.labels(*labels, info.plan, info.backend, info.dtype, str(info.tensor_parallel_size)).set(1)
        CACHE_CONFIG_INFO.labels(
            *labels, str(info.num_pages), str(info.page_size), str(info.page_bytes), str(info.max_model_len)
        ).set(1)
        self._last: dict[Counter, float] = {}
        self._layer_counters: dict[tuple[Counter, tuple[str, ...]], Counter] = {}
        self._counters = {
            "computed_prompt_tokens": PROMPT_TOKENS.labels(*labels),
            "generation_tokens": GENERATION_TOKENS.labels(*labels),
            "preemptions": PREEMPTIONS.labels(*labels),
            "prefix_queries_tokens": PREFIX_CACHE_QUERIES.labels(*labels),
            "prefix_hits_tokens": PREFIX_CACHE_HITS.labels(*labels),
            "forward_s": FORWARD_SECONDS.labels(*labels),
            "python_s": PYTHON_SECONDS.labels(*labels),
        }
        self._gauges = {
            "num_running": REQUESTS_RUNNING.labels(*labels),
            "num_waiting": REQUESTS_WAITING.labels(*labels),
            "kv_usage": KV_CACHE_USAGE.labels(*labels),
        }
        self._histograms = {
            "queue_s": REQUEST_QUEUE_TIME.labels(*labels),
            "prefill_s": REQUEST_PREFILL_TIME.labels(*labels),
            "decode_s": REQUEST_DECODE_TIME.labels(*labels),
            "prompt_tokens": REQUEST_PROMPT_TOKENS.labels(*labels),
            "generation_tokens": REQUEST_GENERATION_TOKENS.labels(*labels),
            "step_s": ENGINE_STEP.labels(*labels),
            "step_tokens": ITERATION_TOKENS.labels(*labels),
            "batch_size": ITERATION_REQUESTS.labels(*labels),
        }
        self._dropped = DROPPED_MESSAGES.labels(*labels)
        self._cpu = CpuSeries("engine")
        for gauge in self._gauges.values():
            gauge.set(0)

    def update(self, stats: EngineStats) -> None:
        """Publish what one step changed. Called by the thread that owns `stats`."""
        self._cpu.update()
        for name, counter in self._counters.items():
            self._grow(counter, getattr(stats, name))
        observations = stats.drain()
        for name, histogram in self._histograms.items():
            for value in getattr(observations, name):
                histogram.observe(value)
        for metric, by_phase in (
            (INDEXER_SECONDS, stats.indexer_s),
            (INDEXER_SAMPLES, stats.indexer_samples),
            (SPARSE_ATTENTION_SECONDS, stats.sparse_attention_s),
            (SPARSE_ATTENTION_SAMPLES, stats.sparse_attention_samples),
        ):
            for (layer_id, phase), value in by_phase.items():
                self._grow_layer(metric, (str(layer_id), phase), value)
        for metric, by_layer, more in (
            (INDEX_SELECTIONS, stats.selections_computed, ("compute",)),
            (INDEX_SELECTIONS, stats.selections_reused, ("reuse",)),
            (INDEX_OVERLAP_SUM, stats.overlap_sum, ()),
            (INDEX_OVERLAP_COUNT, stats.overlap_count, ()),
        ):
            for layer_id, value in by_layer.items():
                self._grow_layer(metric, (str(layer_id), *more), value)
        # Last: who sees an idle engine sees all that it did.
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))

    def count_dropped_message(self) -> None:
        """A message on the replica's control socket was not let in."""
        self._dropped.inc()

    def _grow_layer(self, metric: Counter, labels: tuple[str, ...], value: float) -> None:
        key = (metric, labels)
        counter = self._layer_counters.get(key)
        if counter is None:
            counter = self._layer_counters[key] = metric.labels(*self._labels, *labels)
        self._grow(counter, value)

    def _grow(self, counter: Counter, value: float) -> None:
        last = self._last.get(counter, 0.0)
        if value != last:
            counter.inc(value - last)
            self._last[counter] = value


class IngressSeries:
    """The series that an ingress process writes."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._ttft = TIME_TO_FIRST_TOKEN.labels(model_name)
        self._inter_token = INTER_TOKEN_LATENCY.labels(model_name)
        self._e2e = E2E_REQUEST_LATENCY.labels(model_name)
        self._failovers = FAILOVERS.labels(model_name)

    def timer(self) -> RequestTimer:
        """Start to time one request, or one choice of it, now."""
        return RequestTimer(self)

    def count_failover(self) -> None:
        """A request moved to another replica."""
        self._failovers.inc()

    def count_refusal(self, code: str) -> None:
        """A request was not run. code: the machine-readable code of the error, from our fixed set."""
        REFUSALS.labels(self._model_name, code).inc()


class RequestTimer:
    """Times one choice as its client sees it. Made by IngressSeries.timer when the request arrives."""

    def __init__(self, series: IngressSeries) -> None:
        self._series = series
        self._arrival_s = time.monotonic()
        self._last_send_s: float | None = None

    def sent(self) -> None:
        """Bytes with new tokens were handed to the client's connection."""
        now_s = time.monotonic()
        if self._last_send_s is None:
            self._series._ttft.observe(now_s - self._arrival_s)
        else:
            self._series._inter_token.observe(now_s - self._last_send_s)
        self._last_send_s = now_s

    def finished(self, reason: str) -> None:
        """The last bytes were sent. reason: stop, length, abort or error."""
        self._series._e2e.observe(time.monotonic() - self._arrival_s)
        REQUEST_SUCCESS.labels(self._series._model_name, reason).inc()
