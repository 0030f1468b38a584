"""All dashboards: their files, and their expressions for whoever wants to evaluate them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.grafana import engine, index_cache, platform, service
from deploy.grafana.render import to_json
from deploy.grafana.spec import Dashboard

DASHBOARDS: tuple[Dashboard, ...] = (
    service.DASHBOARD,
    engine.DASHBOARD,
    index_cache.DASHBOARD,
    platform.DASHBOARD,
)
DIRECTORY = "deploy/grafana/dashboards"

# Not $1, which label_replace means.
_VARIABLE = re.compile(r"\$(?:\{([a-z_]\w*)(?::\w+)?\}|([a-z_]\w*))")


@dataclass(frozen=True, slots=True)
class PanelExpression:
    """One query of one panel. dashboard: its uid.  unit: Grafana's id.  optional: see spec.Panel."""

    dashboard: str
    panel: str
    expr: str
    unit: str
    optional: bool


def generated() -> dict[str, str]:
    """Path in the checkout -> content of every dashboard's JSON."""
    return {f"{DIRECTORY}/{dashboard.uid}.json": to_json(dashboard) for dashboard in DASHBOARDS}


def expressions() -> list[PanelExpression]:
    """Every query of every panel, in the order in which they are shown."""
    return [
        PanelExpression(dashboard.uid, panel.title, query.expr, panel.unit, panel.optional)
        for dashboard in DASHBOARDS
        for row in dashboard.rows
        for panel in row.panels
        for query in panel.queries
    ]


def substitute(
    expr: str, *, rate_interval: str = "30s", time_range: str = "5m", variables: Mapping[str, str] | None = None
) -> str:
    """`expr` as Grafana would send it: every variable replaced. Those not given stand at "All".

    rate_interval, time_range: what $__rate_interval and $__range become.
    """
    known = {"__rate_interval": rate_interval, "__range": time_range, **(variables or {})}

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name.startswith("__") and name not in known:
            raise ValueError(f"no value for the variable ${name}")
        return known.get(name, ".*")

    return _VARIABLE.sub(value, expr)
