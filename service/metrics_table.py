"""deploy/METRICS.md: the catalog of the series as a document. `make generate` writes it."""

from __future__ import annotations

from itertools import groupby

from service.metrics import CATALOG, Series

PATH = "deploy/METRICS.md"
_HEAD = """\
# Metrics

Made from `service/metrics.py` by `make generate`: do not edit.

Each pod (in local runs: the machine) has one exporter, `/metrics` on port 9400, with the sums over its processes.
Counters and histograms of a process that died go on; its gauges are gone with the next scrape. `engine` is the
replica's slot, 0 to replicas - 1, which a replacement takes over, perhaps in another pod: sum over instances first,
as in `sum by (engine) (rate(m3_generation_tokens_total[5m]))`. A histogram `x` has the series `x_bucket{le}`, `x_sum`
and `x_count`. What happens per step or token is published up to 0.5 s late.

A *probed* step is one in `--probe-interval`; an *audit* happens on one step in `--audit-interval` with
`--index-reuse audited`.
"""


def generated() -> dict[str, str]:
    """The document, by its path in the checkout."""
    parts = [_HEAD]
    for title, rows in groupby(CATALOG, key=lambda series: series.group):
        parts.append(f"\n## {title}\n\n| series | type | unit | labels | meaning |\n|---|---|---|---|---|\n")
        parts += [_row(series) for series in rows]
    return {PATH: "".join(parts)}


def _row(series: Series) -> str:
    labels = ", ".join(f"`{label}`" for label in series.labels) or "none"
    meaning = series.meaning.replace("|", r"\|")
    return f"| `{series.name}` | {series.kind} | {series.unit} | {labels} | {meaning} |\n"
