"""Dashboard "Engine": scheduler, steps, pages, ranks of each replica."""

from __future__ import annotations

from deploy.grafana.spec import (
    ENGINE,
    IDLE,
    MODEL,
    RANGE,
    WINDOW,
    Dashboard,
    Kind,
    Panel,
    Query,
    Row,
    buckets,
    quantiles,
    service_variables,
)
from deploy.promql import aggregate, increase, mean, quantile, rate, ratio, selector

_LEGEND = "engine {{engine}}"
_STEPS = "m3_engine_step_seconds"


def _gauge(name: str, operation: str = "sum", by: str = "engine") -> str:
    return aggregate(operation, by, selector(name, *ENGINE))


def _replicas() -> tuple[Panel, ...]:
    info = aggregate("max", "engine, plan, backend, dtype, tensor_parallel_size", selector("m3_engine_info", *ENGINE))
    sizes = aggregate(
        "max", "engine, num_pages, page_size, page_bytes, max_model_len", selector("m3_cache_config_info", *ENGINE)
    )
    return (
        Panel(
            Kind.TABLE,
            "Replicas",
            "What each replica runs. Plan: one letter per layer, D dense, F selects, S reuses the selection above.",
            "none",
            (
                Query(info),
                Query(f"time() - {_gauge('m3_engine_start_time_seconds', 'max')}"),
                Query(_gauge("m3_engine_load_seconds", "max")),
                Query(_gauge("m3_weight_bytes", "max")),
                Query(_gauge("m3_kv_cache_bytes", "max")),
            ),
            width=24,
            height=7,
            columns=(
                ("engine", "Engine"),
                ("plan", "Plan"),
                ("backend", "Backend"),
                ("dtype", "Dtype"),
                ("tensor_parallel_size", "Ranks"),
                ("Value #B", "Up for"),
                ("Value #C", "Load time"),
                ("Value #D", "Weights of rank 0"),
                ("Value #E", "KV cache of one rank"),
            ),
            column_units=(
                ("Up for", "dtdurations"),
                ("Load time", "s"),
                ("Weights of rank 0", "bytes"),
                ("KV cache of one rank", "bytes"),
            ),
        ),
        Panel(
            Kind.TABLE,
            "KV cache",
            "How large the cache is: pages times page size is the number of tokens that fit, over all requests.",
            "none",
            (Query(sizes),),
            width=12,
            height=6,
            columns=(
                ("engine", "Engine"),
                ("num_pages", "Pages"),
                ("page_size", "Tokens per page"),
                ("page_bytes", "Bytes per page"),
                ("max_model_len", "Longest request"),
            ),
        ),
        Panel(
            Kind.STAT,
            "Starts",
            "How often each replica was started anew in the time range: deployments, restarts and crashes alike.",
            "none",
            (Query(f"changes({_gauge('m3_engine_start_time_seconds', 'max')}[{RANGE}:15s])", _LEGEND),),
            width=6,
            height=6,
            thresholds=((1, "orange"), (3, "red")),
        ),
        Panel(
            Kind.STAT,
            "Worker groups lost",
            "Groups whose rank died, hung or failed in the time range, as the replica itself noticed; a replica that "
            "is killed as a whole shows under Starts alone.",
            "none",
            (Query(increase("m3_engine_deaths_total", "engine", RANGE, *ENGINE), _LEGEND),),
            width=6,
            height=6,
            thresholds=((0.5, "red"),),
            decimals=0,
        ),
    )


def _steps() -> tuple[Panel, ...]:
    def per_step(name: str) -> str:
        return ratio(rate(name, "", WINDOW, *ENGINE), rate(f"{_STEPS}_count", "", WINDOW, *ENGINE))

    return (
        Panel(
            Kind.TIME_SERIES,
            "Step time",
            f"One engine step, planning included; every running request gets one token per step. {IDLE}",
            "s",
            quantiles(_STEPS, *ENGINE),
        ),
        Panel(
            Kind.BUCKETS,
            "Step time, distribution",
            "One band is decode alone, the band above it steps with prompt chunks.",
            "s",
            buckets(_STEPS, *ENGINE),
        ),
        Panel(
            Kind.STACKED,
            "Where a step goes",
            "Mean time per step on rank 0: planning, in the model, in Python around it, and making the masks of "
            "grammars. Where the next step is planned while one runs, the parts overlap and can exceed the step. "
            f"{IDLE}",
            "s",
            (
                Query(per_step("m3_forward_seconds_total"), "model"),
                Query(per_step("m3_python_seconds_total"), "Python around it"),
                Query(per_step("m3_plan_seconds_total"), "planning"),
                Query(per_step("m3_guided_mask_seconds_total"), "masks"),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Steps",
            "Steps per second of each replica; 0 with open requests is a stalled engine.",
            "suffix: steps/s",
            (Query(rate(f"{_STEPS}_count", "engine", WINDOW, *ENGINE), _LEGEND),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Batch size",
            f"Requests per step: larger batches read the weights for more tokens at once. {IDLE}",
            "none",
            (
                Query(mean("m3_iteration_requests", "engine", WINDOW, *ENGINE), f"{_LEGEND}, mean"),
                Query(quantile(0.95, "m3_iteration_requests", "engine", WINDOW, *ENGINE), f"{_LEGEND}, p95"),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Tokens per step",
            f"Tokens computed in one step, up to max_num_batched_tokens: near it, prompts wait for budget. {IDLE}",
            "none",
            (
                Query(mean("m3_iteration_tokens", "engine", WINDOW, *ENGINE), f"{_LEGEND}, mean"),
                Query(quantile(0.95, "m3_iteration_tokens", "engine", WINDOW, *ENGINE), f"{_LEGEND}, p95"),
            ),
        ),
        Panel(
            Kind.STACKED,
            "Computed tokens by phase",
            "Tokens run in prefill rows (prompts, and what preemption or failover makes again) and in decode rows.",
            "suffix: tok/s",
            (Query(rate("m3_scheduled_tokens_total", "phase", WINDOW, *ENGINE), "{{phase}}"),),
        ),
    )


def _queue() -> tuple[Panel, ...]:
    def time_in(name: str, title: str, meaning: str) -> Panel:
        return Panel(Kind.TIME_SERIES, title, f"{meaning} {IDLE}", "s", quantiles(name, *ENGINE), width=12)

    return (
        Panel(
            Kind.TIME_SERIES,
            "Requests",
            "Running in the batch, waiting for a slot or pages, and open: what ingresses wait for, counted without "
            "the scheduler's word.",
            "none",
            (
                Query(_gauge("m3_num_requests_running"), f"{_LEGEND}, running"),
                Query(_gauge("m3_num_requests_waiting"), f"{_LEGEND}, waiting"),
                Query(_gauge("m3_engine_open_requests"), f"{_LEGEND}, open"),
            ),
            width=12,
        ),
        time_in("m3_request_queue_time_seconds", "Queue time", "From the engine's queue to a request's first step."),
        time_in("m3_request_prefill_time_seconds", "Prefill time", "From a request's first step to its first token."),
        time_in("m3_request_decode_time_seconds", "Decode time", "From a request's first token to its last."),
    )


def _load() -> tuple[Panel, ...]:
    load = _gauge("m3_engine_load", "max")
    return (
        Panel(
            Kind.TIME_SERIES,
            "Load",
            "Tokens of open requests per target_tokens_per_replica, or open requests per max_num_seqs if that is more: "
            "a replica at 1 is full. The sum, rounded up, is how many replicas autoscaling wants.",
            "none",
            (Query(load, _LEGEND), Query(aggregate("sum", "", load), "sum")),
            width=12,
        ),
        Panel(
            Kind.TIME_SERIES,
            "Choice of replica",
            "Requests per second by why their replica was chosen: prefix, it holds the longest known prefix; "
            "overloaded, that one had too much to do; balanced, none holds a prefix.",
            "reqps",
            (Query(rate("m3_routed_requests_total", "choice", WINDOW, *MODEL), "{{choice}}"),),
            width=12,
        ),
    )


def _pages() -> tuple[Panel, ...]:
    hits = rate("m3_prefix_cache_hits_total", "engine", WINDOW, *ENGINE)
    queries = rate("m3_prefix_cache_queries_total", "engine", WINDOW, *ENGINE)
    return (
        Panel(
            Kind.TIME_SERIES,
            "KV cache in use",
            "Share of KV pages that requests hold; at 1 new requests wait, and running ones are preempted.",
            "percentunit",
            (Query(_gauge("m3_kv_cache_usage_perc", "max"), _LEGEND),),
            thresholds=((0.95, "red"),),
            maximum=1,
        ),
        Panel(
            Kind.STACKED,
            "Pages by state",
            "held by requests, cached (nobody's, but a later prompt may find them), or blank (nothing to find).",
            "none",
            (Query(aggregate("sum", "state", selector("m3_kv_pages", *ENGINE)), "{{state}}"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Prefix hit rate",
            f"Share of looked-up prompt tokens that were found in the prefix cache and not computed. {IDLE}",
            "percentunit",
            (Query(ratio(hits, queries), _LEGEND),),
            maximum=1,
        ),
        Panel(
            Kind.TIME_SERIES,
            "Evictions",
            "Cached pages per second that were given to new tokens: their prefix is lost, and is computed again.",
            "suffix: pages/s",
            (Query(rate("m3_page_evictions_total", "engine", WINDOW, *ENGINE), _LEGEND),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Preemptions",
            "Requests per second that lost their pages to others and are computed again: more than a few mean that "
            "max_num_seqs is too high for the cache.",
            "reqps",
            (Query(rate("m3_num_preemptions_total", "engine", WINDOW, *ENGINE), _LEGEND),),
        ),
    )


def _ranks() -> tuple[Panel, ...]:
    by = "engine, rank"
    forward = rate("m3_rank_forward_seconds_total", by, WINDOW, *ENGINE)
    collective = rate("m3_rank_collective_seconds_total", by, WINDOW, *ENGINE)
    busy = ratio(f"({forward} - {collective})", rate("m3_rank_samples_total", by, WINDOW, *ENGINE))
    legend = f"{_LEGEND}, rank {{{{rank}}}}"
    return (
        Panel(
            Kind.TIME_SERIES,
            "Busy per step and rank",
            f"Time in the model without collectives, on probed steps: the highest rank is the slow one. {IDLE}",
            "s",
            (Query(busy, legend),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Skew between ranks",
            "Slowest minus fastest rank, as a share of the slowest: the part of a step that the others wait. "
            f"0 with one rank. {IDLE}",
            "percentunit",
            (
                Query(
                    f"1 - {aggregate('min', 'engine', busy)} / {aggregate('max', 'engine', busy)}",
                    _LEGEND,
                ),
            ),
            thresholds=((0.2, "red"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Share in collectives",
            "Share of a rank's time that passes in collectives, waiting included: the rank that waits least is the "
            f"one that the others wait for. 0 with one rank. {IDLE}",
            "percentunit",
            (Query(ratio(collective, forward), legend),),
            maximum=1,
        ),
    )


DASHBOARD = Dashboard(
    uid="m3-engine",
    title="M3 / Engine",
    description="The engine replicas of m3serve: steps, queue, KV pages, tensor-parallel ranks.",
    variables=service_variables("model_name", "engine"),
    rows=(
        Row("Replicas", _replicas()),
        Row("Steps", _steps()),
        Row("Queue", _queue()),
        Row("Load and routing", _load()),
        Row("Pages and prefix cache", _pages()),
        Row("Ranks, on probed steps", _ranks()),
    ),
)
