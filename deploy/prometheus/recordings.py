"""Recording rules: what alerts and people ask for often, kept under names of the form level:metric:operation."""

from __future__ import annotations

from deploy.prometheus.rule_file import Group, Recording
from deploy.promql import aggregate, quantile, rate, ratio

# Series are summed over processes, never over releases: those differ in namespace and job.
JOB = "namespace, job"
MODEL = f"{JOB}, model_name"
ENGINE = f"{MODEL}, engine"
RANK = f"{ENGINE}, rank"
LAYER = f"{MODEL}, layer"
# Probes of the platform are no requests of clients.
CLIENT = 'route!~"/health|/ready"'


def _p95(name: str) -> Recording:
    return Recording(f"model:{name}:p95_rate5m", quantile(0.95, f"{name}", MODEL, "5m"), "seconds")


def _http_ratio(name: str, status: str) -> Recording:
    """Share of answers with such a status; 0 is there from the first request on."""
    everything = rate("m3_http_requests_total", JOB, "5m", CLIENT)
    part = rate("m3_http_requests_total", JOB, "5m", CLIENT, f'status=~"{status}"')
    return Recording(f"job:{name}:ratio_rate5m", ratio(f"({part} or {everything} * 0)", everything), "ratio")


READY = aggregate("count", MODEL, aggregate("count", ENGINE, "m3_engine_info"))
WANTED = aggregate("max", MODEL, "m3_configured_engine_replicas")
STARTS = Recording(
    "engine:m3_engine_start_time_seconds:max", aggregate("max", ENGINE, "m3_engine_start_time_seconds"), "unix seconds"
)
HTTP_ERRORS = _http_ratio("m3_http_errors", "5..")
HTTP_REFUSED = _http_ratio("m3_http_refused", "429")
REQUEST_ERRORS = Recording(
    "model:m3_request_errors:ratio_rate5m",
    ratio(
        rate("m3_request_success_total", MODEL, "5m", 'finished_reason="error"'),
        rate("m3_request_success_total", MODEL, "5m"),
    ),
    "ratio",
)
TTFT = _p95("m3_time_to_first_token_seconds")
INTER_TOKEN = _p95("m3_inter_token_latency_seconds")
PREEMPTED = Recording(
    "engine:m3_preempted:ratio_rate10m",
    ratio(rate("m3_num_preemptions_total", ENGINE, "10m"), rate("m3_request_queue_time_seconds_count", ENGINE, "10m")),
    "preemptions per request",
)
RANK_BUSY = Recording(
    "rank:m3_rank_busy_seconds:mean_rate15m",
    ratio(
        f"({rate('m3_rank_forward_seconds_total', RANK, '15m')} - "
        f"{rate('m3_rank_collective_seconds_total', RANK, '15m')})",
        rate("m3_rank_samples_total", RANK, "15m"),
    ),
    "seconds",
)
RANK_SKEW = Recording(
    "engine:m3_rank_skew:ratio_rate15m",
    f"1 - {aggregate('min', ENGINE, RANK_BUSY.name)} / {aggregate('max', ENGINE, RANK_BUSY.name)}",
    "ratio",
)
_REUSED = rate("m3_index_selections_total", LAYER, "5m", 'role="reuse"')
_SELECTIONS = rate("m3_index_selections_total", LAYER, "5m")
_SKIP = Recording("layer:m3_index_skip:ratio_rate5m", ratio(f"({_REUSED} or {_SELECTIONS} * 0)", _SELECTIONS), "ratio")
_INDEXER_MEAN = Recording(
    "layer:m3_indexer_seconds:mean_rate15m",
    ratio(
        rate("m3_indexer_seconds_total", f"{LAYER}, phase", "15m"),
        rate("m3_indexer_samples_total", f"{LAYER}, phase", "15m"),
    ),
    "seconds",
)
OVERLAP = Recording(
    "layer:m3_index_overlap:ratio_rate30m",
    ratio(
        rate("m3_index_overlap_sum_total", LAYER, "30m"),
        rate("m3_index_overlap_count_total", LAYER, "30m"),
    ),
    "ratio",
)
INDEXER_SHARE = Recording(
    "engine:m3_indexer_share:ratio_rate15m",
    ratio(
        rate("m3_indexer_seconds_total", ENGINE, "15m"),
        rate("m3_rank_forward_seconds_total", ENGINE, "15m", 'rank="0"'),
    ),
    "ratio",
)

GROUP = Group(
    "m3serve.recordings",
    (
        STARTS,
        HTTP_ERRORS,
        HTTP_REFUSED,
        REQUEST_ERRORS,
        TTFT,
        INTER_TOKEN,
        _p95("m3_e2e_request_latency_seconds"),
        Recording("model:m3_delivered_tokens:rate5m", rate("m3_delivered_tokens_total", MODEL, "5m"), "tokens/s"),
        Recording(
            "engine:m3_prefix_cache_hit:ratio_rate5m",
            ratio(
                rate("m3_prefix_cache_hits_total", ENGINE, "5m"),
                rate("m3_prefix_cache_queries_total", ENGINE, "5m"),
            ),
            "ratio",
        ),
        PREEMPTED,
        RANK_BUSY,
        RANK_SKEW,
        _SKIP,
        _INDEXER_MEAN,
        INDEXER_SHARE,
        OVERLAP,
    ),
)
