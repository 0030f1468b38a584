"""What a dashboard is made of, as plain data. `render` turns it into Grafana's JSON, tests read the expressions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from deploy import promql

# Long enough for four scrapes, whatever the zoom: Grafana computes it.
WINDOW = "$__rate_interval"
# The whole time range that the dashboard shows: for single numbers, since it is costly to compute for every point.
RANGE = "$__range"

# Matchers of the dashboard variables. "All" is `.*`, which also fits series without the label.
NAMESPACE = ('namespace=~"$namespace"',)
SERVICE = (*NAMESPACE, 'job=~"$job"')
MODEL = (*SERVICE, 'model_name=~"$model_name"')
ENGINE = (*MODEL, 'engine=~"$engine"')

IDLE = "Empty while nothing runs."


class Kind(Enum):
    """How a panel draws its queries."""

    TIME_SERIES = "timeseries"
    STACKED = "stacked time series"
    STAT = "stat"
    TEXT = "stat that shows a label"
    BARS = "bargauge"
    TABLE = "table"
    BUCKETS = "heatmap of a histogram"
    ROWS = "heatmap with one row per series"
    STATES = "state-timeline"


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL query. legend: Grafana's format; the name of each series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    description: what it shows and how to read it.  unit: Grafana's id.  width: of 24 columns.  thresholds: value and
    colour from there on; below the first it is green.  states: what the values of a state timeline mean, with a
    colour.  columns: label or query of a table (`Value #A` is the first query's value) and its heading, in order.
    column_units: heading -> unit.
    optional: its series come from an exporter that not everybody has.
    """

    kind: Kind
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    height: int = 8
    thresholds: tuple[tuple[float, str], ...] = ()
    base_color: str = "green"
    maximum: float | None = None
    decimals: int | None = None
    states: tuple[tuple[int, str, str], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    column_units: tuple[tuple[str, str], ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading. collapsed: folded until somebody opens it; its queries do not run before."""

    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = False


@dataclass(frozen=True, slots=True)
class Variable:
    """A dashboard variable whose values are those of a label. query: Grafana's `label_values(...)`."""

    name: str
    label: str
    query: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard. uid: stable for ever, links and bookmarks use it."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


def service_variables(*more: str) -> tuple[Variable, ...]:
    """namespace and job, then `more` of model_name and engine; each lists what fits those before it."""
    labels = {"namespace": "Namespace", "job": "Job", "model_name": "Model", "engine": "Engine"}
    found: list[Variable] = []
    for name in ("namespace", "job", *more):
        series = "m3_engine_info" if name == "engine" else "m3_configured_engine_replicas"
        selected = promql.selector(series, *(f'{before.name}=~"${before.name}"' for before in found))
        found.append(Variable(name, labels[name], f"label_values({selected}, {name})"))
    return tuple(found)


def quantiles(name: str, *matchers: str, window: str = WINDOW) -> tuple[Query, ...]:
    """p50, p95 and p99 of a histogram, over everything that fits."""
    return tuple(Query(promql.quantile(q, name, "", window, *matchers), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99))


def buckets(name: str, *matchers: str) -> tuple[Query, ...]:
    """A histogram as the rows of a heatmap."""
    return (Query(promql.increase(f"{name}_bucket", "le", WINDOW, *matchers), "{{le}}"),)
