"""Dashboard "Index cache": what the lightning indexer costs per layer, how often it is skipped, what that does."""

from __future__ import annotations

from deploy.grafana.spec import (
    ENGINE,
    RANGE,
    WINDOW,
    Dashboard,
    Kind,
    Panel,
    Query,
    Row,
    service_variables,
)
from deploy.promql import aggregate, increase, rate, ratio, selector

_PROBED = "Measured on one step in probe_interval; empty between probed steps and while nothing runs."
_AUDITED = "Needs index_reuse=audited and contexts longer than the selection; else empty."


def _by_layer(expr: str) -> str:
    """Layers as two digits: series come in the order of their labels, and 10 would stand before 3."""
    return f'label_replace({expr}, "layer", "0$1", "layer", "(.)")'


def _per_call(operation: str, phase: str, window: str) -> str:
    """Mean time of a probed call, by layer."""
    matchers = (*ENGINE, f'phase="{phase}"')
    seconds = rate(f"m3_{operation}_seconds_total", "layer", window, *matchers)
    return _by_layer(ratio(seconds, rate(f"m3_{operation}_samples_total", "layer", window, *matchers)))


def _selections(by: str, window: str, role: str = "") -> str:
    matchers = (*ENGINE, f'role="{role}"') if role else ENGINE
    return rate("m3_index_selections_total", by, window, *matchers)


def _overlap(by: str, window: str) -> str:
    return ratio(
        rate("m3_index_overlap_sum_total", by, window, *ENGINE),
        rate("m3_index_overlap_count_total", by, window, *ENGINE),
    )


def _indexer_share(window: str) -> str:
    return ratio(
        rate("m3_indexer_seconds_total", "", window, *ENGINE),
        rate("m3_rank_forward_seconds_total", "", window, *ENGINE, 'rank="0"'),
    )


def _saved(window: str) -> str:
    """What the reusing layers would have added, as a share of the step with them."""
    computed = _selections("", window, "compute")
    per_selection = ratio(f"({_selections('', window, 'reuse')} or {computed} * 0)", computed)
    added = f"(({_indexer_share(window)}) * ({per_selection}))"
    return f"{added} / (1 + {added})"


def _skip_rate(by: str, window: str) -> str:
    # A layer has one role, so its share of reuse is 0 or 1 unless replicas differ or a guard changed it: 0 must not be
    # missing.
    reused = _selections(by, window, "reuse")
    everything = _selections(by, window)
    return ratio(f"({reused} or {everything} * 0)", everything)


def _overview() -> tuple[Panel, ...]:
    return (
        Panel(
            Kind.TEXT,
            "Plan",
            "By which steps run now, and on how many engines. One letter per layer: D dense attention, F runs the "
            "indexer, S reuses what the nearest F above selected. While a guard is active, every S is an F.",
            "none",
            (Query(f"{aggregate('sum', 'plan', selector('m3_index_plan_active', *ENGINE))} > 0", "{{plan}}"),),
            width=24,
            height=4,
        ),
        Panel(
            Kind.STAT,
            "Skip rate",
            "Share of selections that were reused and not computed, over the time range; 0 with a plan that is all F.",
            "percentunit",
            (Query(_skip_rate("", RANGE)),),
            width=6,
            height=5,
        ),
        Panel(
            Kind.STAT,
            "Indexer's share of a step",
            f"Time in score and top-k as a share of the time in the model, both on probed steps of rank 0. {_PROBED}",
            "percentunit",
            (Query(_indexer_share(RANGE)),),
            width=6,
            height=5,
            thresholds=((0.1, "orange"), (0.25, "red")),
        ),
        Panel(
            Kind.STAT,
            "Step time saved by reuse, estimated",
            "If every reusing layer had run an indexer as costly as the measured ones, steps would be longer by this "
            f"share of their length. {_PROBED}",
            "percentunit",
            (Query(_saved(RANGE)),),
            width=6,
            height=5,
        ),
        Panel(
            Kind.STAT,
            "Overlap",
            "Share of the blocks of a fresh selection that the reused one holds too: 1 means that sharing changed "
            f"nothing. {_AUDITED}",
            "percentunit",
            (Query(_overlap("", RANGE)),),
            width=6,
            height=5,
            thresholds=((0.8, "orange"), (0.9, "green")),
            base_color="red",
        ),
    )


def _cost() -> tuple[Panel, ...]:
    def bars(title: str, operation: str, phase: str, meaning: str) -> Panel:
        return Panel(
            Kind.BARS,
            title,
            f"{meaning} {_PROBED}",
            "s",
            (Query(_per_call(operation, phase, WINDOW), "layer {{layer}}"),),
            width=12,
            height=10,
        )

    def over_time(title: str, operation: str, phase: str, meaning: str) -> Panel:
        return Panel(
            Kind.ROWS,
            title,
            f"{meaning} {_PROBED}",
            "s",
            (Query(_per_call(operation, phase, WINDOW), "{{layer}}"),),
            width=12,
            height=10,
        )

    decode = "Mean time of one call in decode steps, by layer: it grows with the context."
    prefill = "Mean time of one call for a prompt chunk, by layer: it grows with context and chunk."
    return (
        bars("Indexer, decode, by layer", "indexer", "decode", decode),
        over_time("Indexer, decode, over time", "indexer", "decode", decode),
        bars("Indexer, prefill, by layer", "indexer", "prefill", prefill),
        over_time("Indexer, prefill, over time", "indexer", "prefill", prefill),
        Panel(
            Kind.TIME_SERIES,
            "Indexer's share of a step",
            f"Time in score and top-k as a share of the time in the model, both on probed steps of rank 0. {_PROBED}",
            "percentunit",
            (Query(_indexer_share(WINDOW), "indexer"), Query(_saved(WINDOW), "saved by reuse, estimated")),
            width=12,
        ),
        Panel(
            Kind.TIME_SERIES,
            "Attention and indexer, per probed step",
            "Time of all layers together: what reuse can save is the indexer's part, what it must not harm is what "
            f"sparse attention then reads. {_PROBED}",
            "s",
            (
                Query(
                    ratio(
                        rate("m3_indexer_seconds_total", "", WINDOW, *ENGINE),
                        rate("m3_rank_samples_total", "", WINDOW, *ENGINE, 'rank="0"'),
                    ),
                    "indexer",
                ),
                Query(
                    ratio(
                        rate("m3_sparse_attention_seconds_total", "", WINDOW, *ENGINE),
                        rate("m3_rank_samples_total", "", WINDOW, *ENGINE, 'rank="0"'),
                    ),
                    "sparse attention",
                ),
            ),
            width=12,
        ),
    )


def _reuse() -> tuple[Panel, ...]:
    return (
        Panel(
            Kind.BARS,
            "Skip rate by layer",
            "Share of a layer's selections that it reused: 1 for the S layers of the plan, 0 for the F layers.",
            "percentunit",
            (Query(_by_layer(_skip_rate("layer", WINDOW)), "layer {{layer}}"),),
            width=12,
            height=10,
            maximum=1,
        ),
        Panel(
            Kind.STACKED,
            "Selections by role",
            "Selections per second that layers computed or reused, counted where it happens: in the model.",
            "suffix: selections/s",
            (Query(_selections("role", WINDOW), "{{role}}"),),
            width=12,
            height=10,
        ),
        Panel(
            Kind.TABLE,
            "Plan by layer",
            "The role of each layer, and the layer whose selection it attends with.",
            "none",
            (Query(_by_layer(aggregate("max", "layer, role, source", selector("m3_index_layer_info", *ENGINE)))),),
            width=12,
            height=10,
            columns=(("layer", "Layer"), ("role", "Role"), ("source", "Selection of layer")),
        ),
    )


def _audit() -> tuple[Panel, ...]:
    return (
        Panel(
            Kind.BARS,
            "Overlap by layer",
            "Share of the blocks of a fresh selection that the reused one holds too, as last seen: a layer far "
            f"below the others should select for itself. {_AUDITED}",
            "percentunit",
            (Query(_by_layer(_overlap("layer", WINDOW)), "layer {{layer}}"),),
            width=12,
            height=10,
            maximum=1,
            thresholds=((0.8, "orange"), (0.9, "green")),
            base_color="red",
        ),
        Panel(
            Kind.ROWS,
            "Overlap by layer over time",
            f"The same over time: a fall after a change of traffic means that the plan fits it less. {_AUDITED}",
            "percentunit",
            (Query(_by_layer(_overlap("layer", WINDOW)), "{{layer}}"),),
            width=12,
            height=10,
        ),
        Panel(
            Kind.TIME_SERIES,
            "Audited pairs",
            f"Pairs of token and index head per second that were audited: few of them say little. {_AUDITED}",
            "suffix: pairs/s",
            (Query(rate("m3_index_overlap_count_total", "", WINDOW, *ENGINE), "audited"),),
            width=12,
        ),
        Panel(
            Kind.STATES,
            "Guard",
            "Whether the audit's guard has every sparse layer select for itself, by engine. It does while overlaps are "
            "below audit_overlap_floor; each change empties the prefix cache. Overlaps are measured on meanwhile.",
            "none",
            (Query(aggregate("max", "engine", selector("m3_index_guard_active", *ENGINE)), "engine {{engine}}"),),
            width=12,
            states=((0, "as planned", "green"), (1, "all layers select", "orange")),
        ),
        Panel(
            Kind.STAT,
            "Guard trips",
            "How often guards became active within the time range. Many: see M3IndexGuardFlapping in the runbook.",
            "none",
            (Query(increase("m3_index_guard_trips_total", "", RANGE, *ENGINE)),),
            width=12,
            decimals=0,
            thresholds=((1, "orange"),),
        ),
    )


def _attention() -> tuple[Panel, ...]:
    def bars(phase: str, meaning: str) -> Panel:
        return Panel(
            Kind.BARS,
            f"Sparse attention, {phase}, by layer",
            f"{meaning} {_PROBED}",
            "s",
            (Query(_per_call("sparse_attention", phase, WINDOW), "layer {{layer}}"),),
            width=12,
            height=10,
        )

    return (
        bars("decode", "Mean time of one call in decode steps: bounded, however long the context is."),
        bars("prefill", "Mean time of one call for a prompt chunk: it depends on how alike neighbours select."),
    )


DASHBOARD = Dashboard(
    uid="m3-index-cache",
    title="M3 / Index cache",
    description="The shared top-k index cache: indexer time by layer, skip rate, overlap of reused selections.",
    variables=service_variables("model_name", "engine"),
    rows=(
        Row("Overview", _overview()),
        Row("Indexer time", _cost()),
        Row("Reuse", _reuse()),
        Row("Audit of reused selections", _audit()),
        Row("Sparse attention time", _attention()),
    ),
)
