"""The catalog of the series, its document, and how values get into it."""

from __future__ import annotations

import random
import re

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as PlainHistogram

from service import metrics_table
from service.metrics import CATALOG, Histogram

UNITS = {
    *("seconds", "tokens", "requests", "responses", "messages", "replicas", "processes", "pages", "bytes", "steps"),
    *("calls", "selections", "pairs", "ratio", "constant 1", "0 or 1", "trips"),
}


@pytest.mark.parametrize("series", CATALOG, ids=lambda series: series.name)
def test_names_units_and_labels_follow_the_rules(series: metrics_table.Series) -> None:
    assert re.fullmatch("m3_[a-z0-9_]+[a-z]", series.name)
    assert (series.kind == "counter") == series.name.endswith("_total")
    assert series.unit in UNITS and series.meaning
    if series.unit in ("seconds", "bytes"):
        assert re.search(f"_{series.unit}(_total)?$", series.name), "base units stand in the name"
    [family] = series.metric.describe()
    assert family.type == series.kind
    assert family.documentation == series.meaning
    assert series.metric._labelnames == series.labels


def test_names_are_unique() -> None:
    names = [series.name for series in CATALOG]
    assert len(names) == len(set(names)) > 50


def test_the_document_has_one_row_per_series() -> None:
    [text] = metrics_table.generated().values()
    rows = re.findall(r"^\| `(m3_\w+)` \|(.*)\|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == [series.name for series in CATALOG]
    assert all(len(re.findall(r"(?<!\\)\|", rest)) == 3 for _, rest in rows)


def test_many_values_at_once_are_the_same_as_one_by_one() -> None:
    bounds = (0.1, 1.0, 2.5)
    registry = CollectorRegistry()
    ours = Histogram("ours", "-", ["a"], buckets=bounds, registry=registry)
    plain = PlainHistogram("plain", "-", ["a"], buckets=bounds, registry=registry)
    rng = random.Random(0)
    values = [0.0, 0.1, 1.0, 1.5, 2.5, 9.0, *(rng.uniform(0, 4) for _ in range(100))]
    for value in values:
        plain.labels("x").observe(value)
    ours.labels("x").observe_many(values[:50])
    ours.labels("x").observe_many([])
    ours.labels("x").observe_many(values[50:])

    def samples(name: str) -> dict[tuple[str, str], float]:
        return {
            (sample.name.removeprefix(name), sample.labels.get("le", "")): pytest.approx(sample.value)
            for family in registry.collect()
            for sample in family.samples
            if family.name == name and not sample.name.endswith("_created")
        }

    assert samples("ours") == samples("plain")
