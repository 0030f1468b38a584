"""Recording rules and alerts: `generated()` makes deploy/prometheus/rules.yaml.

The file is one for `rule_files:` and, as `spec`, one for a PrometheusRule. Its groups name no interval: they run at the
Prometheus server's own. Each alert has its section in deploy/RUNBOOK.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.prometheus import recordings
from deploy.prometheus.recordings import CLIENT, ENGINE, JOB, LAYER, MODEL
from deploy.prometheus.rule_file import Alert, Group, Recording, to_yaml
from deploy.promql import aggregate, increase, rate

PATH = "deploy/prometheus/rules.yaml"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When the alerts fire. Ratios are of 1, times of alerts as Prometheus writes durations."""

    # A replica that loads weights is missing all that time.
    none_ready_for: str = "5m"
    replicas_missing_for: str = "15m"
    # step_timeout_s (default 120 s) should have ended such a worker group.
    stalled_for: str = "2m"
    no_ingress_for: str = "2m"
    scrape_down_for: str = "5m"
    crash_loop_starts: int = 3
    error_ratio: float = 0.05
    refused_ratio: float = 0.05
    # Below this many requests in 5 minutes a ratio says nothing.
    min_requests: int = 10
    # Prompts of 100k tokens take seconds: set it to what was promised.
    time_to_first_token_s: float = 10.0
    inter_token_latency_s: float = 0.5
    latency_for: str = "10m"
    kv_cache_usage: float = 0.95
    kv_cache_for: str = "10m"
    preempted_ratio: float = 0.1
    rank_skew: float = 0.2
    overlap: float = 0.8
    # Pairs of token and index head within 30 minutes.
    min_overlap_pairs: int = 1000
    guard_active_for: str = "5m"
    # Within an hour.
    guard_trips: int = 3
    indexer_share: float = 0.25


_WHO = "{{ $labels.model_name }}"
_SLOT = "{{ $labels.model_name }}, engine {{ $labels.engine }}"


def _availability(limits: Thresholds) -> Group:
    return Group(
        "m3serve.availability",
        (
            Alert(
                "M3EngineDown",
                "critical",
                f"({recordings.READY} or {recordings.WANTED} * 0)",
                "== 0",
                "replicas",
                limits.none_ready_for,
                f"No engine replica of {_WHO} is ready",
                "Every request waits and then gets a 503.",
            ),
            Alert(
                "M3EngineReplicasMissing",
                "warning",
                f"{recordings.WANTED} - {recordings.READY}",
                "> 0",
                "replicas",
                limits.replicas_missing_for,
                f"Engine replicas of {_WHO} missing: {{{{ $value }}}}",
                "The others carry the load.",
            ),
            Alert(
                "M3EngineStalled",
                "critical",
                aggregate("max", ENGINE, "m3_engine_open_requests"),
                "> 0",
                "requests",
                limits.stalled_for,
                f"{_SLOT}, runs no steps",
                "It has not finished a step for 2 minutes and more. Requests that wait for it: {{ $value }}.",
                guard=f"and {rate('m3_engine_step_seconds_count', ENGINE, '2m')} == 0",
            ),
            Alert(
                "M3NoIngress",
                "critical",
                f"({aggregate('sum', MODEL, 'm3_ingress_replicas')} or {recordings.READY} * 0)",
                "== 0",
                "replicas",
                limits.no_ingress_for,
                "No HTTP front process{{ with $labels.model_name }} of {{ . }}{{ end }} lives",
                "Nobody answers clients. Without a model name: Prometheus sees no m3serve at all.",
                guard="or (absent(m3_ingress_replicas) unless on () m3_engine_info)",
            ),
            Alert(
                "M3ScrapeDown",
                "warning",
                "up",
                "== 0",
                "ratio",
                limits.scrape_down_for,
                "{{ $labels.instance }} of job {{ $labels.job }} cannot be scraped",
                "Its series are missing: other alerts may be blind.",
                guard=f"and on ({JOB}) group by ({JOB}) (last_over_time(m3_configured_engine_replicas[1h]))",
            ),
            Alert(
                "M3ReplicaRestarts",
                "warning",
                f"changes({recordings.STARTS.name}[15m])",
                "> 0",
                "starts",
                "0m",
                f"{_SLOT}, was started anew",
                "New starts within 15 minutes: {{ $value }}. Its requests moved to other replicas and went on there.",
            ),
            Alert(
                "M3ReplicaCrashLoop",
                "critical",
                f"changes({recordings.STARTS.name}[30m])",
                f"> {limits.crash_loop_starts}",
                "starts",
                "0m",
                f"{_SLOT}, dies again and again",
                "New starts within 30 minutes: {{ $value }}.",
            ),
        ),
    )


def _requests(limits: Thresholds) -> Group:
    errors = f"{recordings.HTTP_ERRORS.name}|{recordings.REQUEST_ERRORS.name}"
    enough = f"and {increase('m3_http_requests_total', JOB, '5m', CLIENT)} >= {limits.min_requests}"
    return Group(
        "m3serve.requests",
        (
            Alert(
                "M3ErrorRatioHigh",
                "critical",
                aggregate("max", JOB, f'{{__name__=~"{errors}"}}'),
                f"> {limits.error_ratio:g}",
                "ratio",
                "5m",
                "Requests fail in job {{ $labels.job }}",
                "{{ $value | humanizePercentage }} of the answers are a 5xx, or of the requests end by an error.",
                guard=enough,
            ),
            Alert(
                "M3RefusalsHigh",
                "warning",
                recordings.HTTP_REFUSED.name,
                f"> {limits.refused_ratio:g}",
                "ratio",
                "10m",
                "Requests are refused in job {{ $labels.job }}",
                "{{ $value | humanizePercentage }} of the answers are a 429: the queues of all replicas are full.",
                guard=enough,
            ),
            Alert(
                "M3TimeToFirstTokenHigh",
                "warning",
                recordings.TTFT.name,
                f"> {limits.time_to_first_token_s:g}",
                "seconds",
                limits.latency_for,
                f"Slow first tokens of {_WHO}",
                f"The p95 is {{{{ $value | humanizeDuration }}}}, above {limits.time_to_first_token_s:g} s.",
            ),
            Alert(
                "M3InterTokenLatencyHigh",
                "warning",
                recordings.INTER_TOKEN.name,
                f"> {limits.inter_token_latency_s:g}",
                "seconds",
                limits.latency_for,
                f"Streams of {_WHO} stutter",
                "The p95 between two sends is {{ $value | humanizeDuration }}, "
                f"above {limits.inter_token_latency_s:g} s.",
            ),
            Alert(
                "M3FailoversGivenUp",
                "warning",
                increase("m3_failovers_given_up_total", MODEL, "15m"),
                "> 0",
                "requests",
                "0m",
                f"Requests of {_WHO} were given up",
                "They had moved to another replica retry_limit times and ended by an error.",
            ),
            Alert(
                "M3DroppedMessages",
                "warning",
                increase("m3_dropped_messages_total", f"{MODEL}, socket", "15m"),
                "> 0",
                "messages",
                "0m",
                f"Foreign messages on the {{{{ $labels.socket }}}} socket of {_WHO}",
                "They had a wrong token or form and were dropped.",
            ),
            Alert(
                "M3TokenMismatches",
                "critical",
                increase("m3_token_mismatches_total", MODEL, "15m"),
                "> 0",
                "requests",
                "0m",
                f"Requests of {_WHO} ended with a wrong number of tokens",
                "What clients got is not what the engine counted: a bug. Requests: {{ $value | humanize }}.",
            ),
        ),
    )


def _engines(limits: Thresholds) -> Group:
    return Group(
        "m3serve.engines",
        (
            Alert(
                "M3KVCacheFull",
                "warning",
                aggregate("max", ENGINE, "m3_kv_cache_usage_perc"),
                f"> {limits.kv_cache_usage:g}",
                "ratio",
                limits.kv_cache_for,
                f"{_SLOT}, has no free KV pages",
                "{{ $value | humanizePercentage }} of the pages are held: requests wait, or lose their pages.",
            ),
            Alert(
                "M3PreemptionsHigh",
                "warning",
                recordings.PREEMPTED.name,
                f"> {limits.preempted_ratio:g}",
                "preemptions per request",
                "10m",
                f"{_SLOT}, preempts requests",
                "{{ $value | humanizePercentage }} as many preemptions as requests: their tokens are computed twice.",
            ),
            Alert(
                "M3RankSkewHigh",
                "warning",
                recordings.RANK_SKEW.name,
                f"> {limits.rank_skew:g}",
                "ratio",
                "15m",
                f"{_SLOT}, has a slow rank",
                "The others wait {{ $value | humanizePercentage }} of its time for it.",
            ),
            Alert(
                "M3PageCheckFailed",
                "critical",
                increase("m3_page_check_failures_total", ENGINE, "15m"),
                "> 0",
                "replicas",
                "0m",
                f"{_SLOT}, lost count of its KV pages",
                "It ended itself before a page could get a second owner: a bug. Serve starts another one.",
            ),
        ),
    )


def _index_cache(limits: Thresholds) -> Group:
    return Group(
        "m3serve.index_cache",
        (
            Alert(
                "M3IndexOverlapLow",
                "warning",
                recordings.OVERLAP.name,
                f"< {limits.overlap:g}",
                "ratio",
                "10m",
                f"Layer {{{{ $labels.layer }}}} of {_WHO} reuses a selection that does not fit",
                "Only {{ $value | humanizePercentage }} of a fresh selection is in the reused one.",
                guard=f"and {increase('m3_index_overlap_count_total', LAYER, '30m')} >= {limits.min_overlap_pairs}",
            ),
            Alert(
                "M3IndexGuardActive",
                "warning",
                aggregate("max", ENGINE, "m3_index_guard_active"),
                "> 0",
                "0 or 1",
                limits.guard_active_for,
                f"{_SLOT}, selects in every sparse layer",
                "Reused selections overlapped too little with fresh ones: the guard switched reuse off. Answers are "
                "those of a plan without an S, and steps take longer.",
            ),
            Alert(
                "M3IndexGuardFlapping",
                "warning",
                increase("m3_index_guard_trips_total", ENGINE, "1h"),
                f"> {limits.guard_trips}",
                "trips",
                "0m",
                f"{_SLOT}, switches the reuse of selections off and on",
                "Its guard tripped {{ $value | humanize }} times within an hour. Each change empties the prefix cache.",
            ),
            Alert(
                "M3IndexShareHigh",
                "info",
                recordings.INDEXER_SHARE.name,
                f"> {limits.indexer_share:g}",
                "ratio",
                "30m",
                f"{_SLOT}, spends much of its steps in the indexer",
                "{{ $value | humanizePercentage }} of a step: sharing selections between layers would shorten it.",
            ),
        ),
    )


def groups(limits: Thresholds | None = None) -> tuple[Group, ...]:
    """All rules; alerts at the default thresholds or at those of `limits`."""
    limits = limits or Thresholds()
    alerts = (_availability(limits), _requests(limits), _engines(limits), _index_cache(limits))
    return (recordings.GROUP, *alerts)


def generated() -> dict[str, str]:
    """Path in the checkout -> content of the rule file."""
    return {PATH: to_yaml(groups())}


@dataclass(frozen=True, slots=True)
class RuleExpression:
    """One rule, for whoever wants to evaluate it.

    kind: recording or alert.  value: of an alert, what is compared: it returns data also while nothing fires.
    unit: of `value`.
    """

    group: str
    name: str
    kind: str
    expr: str
    value: str
    unit: str


def expressions() -> list[RuleExpression]:
    """Every rule, in the order of evaluation."""
    return [
        RuleExpression(group.name, rule.name, "recording", rule.expr, rule.expr, rule.unit)
        if isinstance(rule, Recording)
        else RuleExpression(group.name, rule.name, "alert", rule.expr, rule.value, rule.unit)
        for group in groups()
        for rule in group.rules
    ]
