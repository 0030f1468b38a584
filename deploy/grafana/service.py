"""Dashboard "Service": what clients get. The ingress measures it, once, when bytes go out."""

from __future__ import annotations

from deploy.grafana.spec import (
    IDLE,
    MODEL,
    NAMESPACE,
    RANGE,
    SERVICE,
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

# Probes of the platform are no requests of clients.
_CLIENT = (*SERVICE, 'route!~"/health|/ready"')
_TOKENS_PER_S = "suffix: tok/s"


def _error_ratio() -> str:
    errors = rate("m3_http_requests_total", "", WINDOW, *_CLIENT, 'status=~"5.."')
    return ratio(f"({errors} or vector(0))", rate("m3_http_requests_total", "", WINDOW, *_CLIENT))


def _at_a_glance() -> tuple[Panel, ...]:
    engines = aggregate(
        "count", "", aggregate("count", "namespace, job, model_name, engine", selector("m3_engine_info", *MODEL))
    )
    firing = aggregate("count", "", selector("ALERTS", 'alertname=~"M3.+"', 'alertstate="firing"', *NAMESPACE))
    return (
        Panel(
            Kind.STAT,
            "Alerts firing",
            "Alerts of this service that fire now; 0 also when the rules are not loaded into this Prometheus.",
            "none",
            (Query(f"{firing} or vector(0)"),),
            width=3,
            height=5,
            thresholds=((1, "red"),),
        ),
        Panel(
            Kind.STAT,
            "Engine replicas",
            "Replicas that are ready, and those that the settings ask for; a replica that loads is not ready.",
            "none",
            (
                Query(f"{engines} or vector(0)", "ready"),
                Query(
                    aggregate(
                        "sum",
                        "",
                        aggregate(
                            "max",
                            "namespace, job, model_name",
                            selector("m3_configured_engine_replicas", *MODEL),
                        ),
                    ),
                    "wanted",
                ),
            ),
            width=4,
            height=5,
        ),
        Panel(
            Kind.STAT,
            "Requests",
            "HTTP answers that began, probes left out; a stream counts once, when its answer begins.",
            "reqps",
            (Query(rate("m3_http_requests_total", "", WINDOW, *_CLIENT)),),
            width=3,
            height=5,
        ),
        Panel(
            Kind.STAT,
            "Error ratio",
            f"Share of answers with a 5xx status; a stream that breaks later shows in the finish reasons. {IDLE}",
            "percentunit",
            (Query(_error_ratio()),),
            width=3,
            height=5,
            thresholds=((0.01, "orange"), (0.05, "red")),
        ),
        Panel(
            Kind.STAT,
            "TTFT p95",
            f"Time to first token that 95 of 100 requests stay below: queueing, prompt and first send. {IDLE}",
            "s",
            (Query(quantile(0.95, "m3_time_to_first_token_seconds", "", WINDOW, *MODEL)),),
            width=4,
            height=5,
            thresholds=((2, "orange"), (10, "red")),
        ),
        Panel(
            Kind.STAT,
            "Inter-token latency p95",
            f"Pause between two sends of one stream that 95 of 100 pauses stay below. {IDLE}",
            "s",
            (Query(quantile(0.95, "m3_inter_token_latency_seconds", "", WINDOW, *MODEL)),),
            width=4,
            height=5,
            thresholds=((0.2, "orange"), (0.5, "red")),
        ),
        Panel(
            Kind.STAT,
            "Delivered tokens",
            "Generated tokens that left for clients; echoed prompts are not in it.",
            _TOKENS_PER_S,
            (Query(rate("m3_delivered_tokens_total", "", WINDOW, *MODEL)),),
            width=3,
            height=5,
        ),
    )


def _requests() -> tuple[Panel, ...]:
    return (
        Panel(
            Kind.STACKED,
            "Requests by status",
            "HTTP answers that began, by status: 429 is a full queue, 503 that no engine is ready, 5xx else a fault.",
            "reqps",
            (Query(rate("m3_http_requests_total", "status", WINDOW, *_CLIENT), "{{status}}"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Error ratio",
            f"Share of answers with a 5xx status, and of requests that ended by an error once begun. {IDLE}",
            "percentunit",
            (
                Query(_error_ratio(), "answers with 5xx"),
                Query(
                    ratio(
                        rate("m3_request_success_total", "", WINDOW, *MODEL, 'finished_reason="error"'),
                        rate("m3_request_success_total", "", WINDOW, *MODEL),
                    ),
                    "requests ended by an error",
                ),
            ),
            thresholds=((0.05, "red"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "In flight",
            "HTTP requests that are being answered now, streams until their last byte or until the client leaves.",
            "none",
            (Query(aggregate("sum", "", selector("m3_http_requests_in_flight", *SERVICE))),),
        ),
        Panel(
            Kind.STACKED,
            "Finish reasons",
            "Requests that ended: stop and length are successes, abort is a client that left, error is ours.",
            "reqps",
            (Query(rate("m3_request_success_total", "finished_reason", WINDOW, *MODEL), "{{finished_reason}}"),),
        ),
        Panel(
            Kind.STACKED,
            "Refusals by code",
            "Requests that were not run: engine_overloaded (429) asks for more replicas, the 4xx codes for a look at "
            "the client. A code appears with its first refusal.",
            "reqps",
            (Query(rate("m3_refusals_total", "code", WINDOW, *MODEL), "{{code}}"),),
        ),
        Panel(
            Kind.STACKED,
            "Requests by route",
            "HTTP answers that began, by route; unknown is a path that we do not serve.",
            "reqps",
            (Query(rate("m3_http_requests_total", "route", WINDOW, *SERVICE), "{{route}}"),),
        ),
    )


def _latency() -> tuple[Panel, ...]:
    def pair(series: str, title: str, meaning: str) -> tuple[Panel, Panel]:
        return (
            Panel(
                Kind.TIME_SERIES,
                title,
                f"{meaning} Quantiles are interpolated within buckets. {IDLE}",
                "s",
                quantiles(series, *MODEL),
                width=12,
            ),
            Panel(
                Kind.BUCKETS,
                f"{title}, distribution",
                f"{meaning} Two bands mean two kinds of requests: quantiles hide that.",
                "s",
                buckets(series, *MODEL),
                width=12,
            ),
        )

    return (
        *pair(
            "m3_time_to_first_token_seconds",
            "Time to first token",
            "From a request's arrival to its first bytes: it grows with the queue and with the prompt.",
        ),
        *pair(
            "m3_inter_token_latency_seconds",
            "Inter-token latency",
            "Between two sends of one stream: a step of the engine, longer when prompts share the step.",
        ),
        *pair(
            "m3_request_time_per_output_token_seconds",
            "Time per output token",
            "Per request, from its first bytes to its last, divided by the tokens after the first send.",
        ),
        *pair(
            "m3_e2e_request_latency_seconds",
            "Whole request",
            "From a request's arrival to its last bytes: mostly the number of tokens that were asked for.",
        ),
    )


def _tokens() -> tuple[Panel, ...]:
    return (
        Panel(
            Kind.TIME_SERIES,
            "Tokens",
            "Prompt tokens that engines computed, tokens that they sampled, those among them under a grammar, and "
            "tokens that clients got; sampled above delivered is text held back for a stop string, or lost with a "
            "replica and made again.",
            _TOKENS_PER_S,
            (
                Query(rate("m3_prompt_tokens_total", "", WINDOW, *MODEL), "prompt, computed"),
                Query(rate("m3_generation_tokens_total", "", WINDOW, *MODEL), "sampled"),
                Query(rate("m3_guided_tokens_total", "", WINDOW, *MODEL), "sampled, guided"),
                Query(rate("m3_delivered_tokens_total", "", WINDOW, *MODEL), "delivered"),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Prompt length",
            f"Prompt tokens of requests that ended. {IDLE}",
            "none",
            quantiles("m3_request_prompt_tokens", *MODEL),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Generated length",
            f"Tokens that requests had generated when they ended. {IDLE}",
            "none",
            quantiles("m3_request_generation_tokens", *MODEL),
        ),
    )


def _front() -> tuple[Panel, ...]:
    thousand_tokens = f"({rate('m3_delivered_tokens_total', '', WINDOW, *MODEL)} / 1000 > 0)"
    cpu = rate("m3_process_cpu_seconds_total", "process", WINDOW, *SERVICE)
    return (
        Panel(
            Kind.TIME_SERIES,
            "CPU per 1000 tokens",
            "CPU seconds of ingress and engine replica processes per 1000 delivered tokens, model ranks not included: "
            f"the robust measure of what serving costs. {IDLE}",
            "s",
            (Query(f"{cpu} / on () group_left () {thousand_tokens}", "{{process}}"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "CPU of the token path",
            "Processors in use by ingress and engine replica processes; a Python process cannot use much more than "
            "one, so add ingress replicas when the value nears their number.",
            "none",
            (
                Query(cpu, "{{process}}"),
                Query(aggregate("sum", "", selector("m3_ingress_replicas", *MODEL)), "ingress replicas"),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Tokenise",
            f"Encoding the texts of one HTTP request, in a thread of the ingress. {IDLE}",
            "s",
            quantiles("m3_tokenize_seconds", *MODEL),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Guided requests",
            "Requests per second whose text has to match a schema, a regular expression, a list or a grammar: hit, it "
            "was compiled already.",
            "suffix: requests/s",
            (Query(rate("m3_grammars_total", "cache", WINDOW, *MODEL), "{{cache}}"),),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Compile a grammar",
            f"Of those that were not, in a thread of the ingress, its queue included. {IDLE}",
            "s",
            quantiles("m3_grammar_compile_seconds", *MODEL),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Requests per submit",
            "Requests that left for a replica together: they gather while the submit before them is prepared, so it "
            f"rises with load. {IDLE}",
            "none",
            (
                Query(mean("m3_submit_requests", "", WINDOW, *MODEL), "mean"),
                Query(quantile(0.95, "m3_submit_requests", "", WINDOW, *MODEL), "p95"),
            ),
        ),
        Panel(
            Kind.TIME_SERIES,
            "Dropped messages",
            "Socket messages with a wrong token or form; anything but 0 means another version of the service, or "
            "somebody else, on our ports.",
            "none",
            (Query(increase("m3_dropped_messages_total", "socket", WINDOW, *MODEL), "{{socket}}"),),
            thresholds=((1, "red"),),
        ),
    )


def _failover() -> tuple[Panel, ...]:
    seconds = "m3_failover_seconds"
    return (
        Panel(
            Kind.TIME_SERIES,
            "Failovers",
            "Requests that moved to another replica with the tokens they had: replica_lost when theirs died, "
            "events_lost when tokens were missed on the way. Clients see a pause, not an error.",
            "none",
            (Query(increase("m3_failovers_total", "cause", WINDOW, *MODEL), "{{cause}}"),),
        ),
        Panel(
            Kind.STAT,
            "Time to recover",
            "From the loss of a request's replica to its next token elsewhere, over the whole time range. "
            "Empty when no request moved.",
            "s",
            quantiles(seconds, *MODEL, window=RANGE),
        ),
        Panel(
            Kind.STAT,
            "Given up",
            "Requests that ended in an error after retry_limit failovers, over the whole time range; more than 0 is "
            "worth a look at the engines' logs.",
            "none",
            (Query(increase("m3_failovers_given_up_total", "", RANGE, *MODEL)),),
            thresholds=((0.5, "red"),),
            decimals=0,
        ),
        Panel(
            Kind.TIME_SERIES,
            "Submits sent again",
            "Submits that no replica accepted: they met one that was about to end, or stood still. A few around a "
            "death are normal.",
            "none",
            (Query(increase("m3_submits_not_accepted_total", "", WINDOW, *MODEL), "not accepted"),),
        ),
        Panel(
            Kind.STAT,
            "Integrity",
            "Requests whose logits were not finite or whose grammar got too complex to go on, ends that replica and "
            "ingress counted differently, and page accounting that did not balance, over the whole time range. Each "
            "should be 0.",
            "none",
            (
                Query(increase("m3_requests_not_finite_total", "", RANGE, *MODEL), "not finite"),
                Query(increase("m3_requests_not_guided_total", "", RANGE, *MODEL), "not guided"),
                Query(increase("m3_token_mismatches_total", "", RANGE, *MODEL), "token mismatches"),
                Query(increase("m3_page_check_failures_total", "", RANGE, *MODEL), "page checks"),
            ),
            thresholds=((0.5, "red"),),
            decimals=0,
        ),
    )


DASHBOARD = Dashboard(
    uid="m3-service",
    title="M3 / Service",
    description="What clients of m3serve get: requests, latency, tokens, failover.",
    variables=service_variables("model_name"),
    rows=(
        Row("At a glance", _at_a_glance()),
        Row("Requests", _requests()),
        Row("Latency, as clients see it", _latency()),
        Row("Tokens", _tokens()),
        Row("Front", _front()),
        Row("Failover", _failover()),
    ),
)
