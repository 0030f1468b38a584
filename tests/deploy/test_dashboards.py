"""The dashboards: in step with their code, over series that exist, in the form that Grafana reads."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import tools
from deploy.grafana import dashboards
from deploy.grafana.ray_series import AMD_LABELS, AMD_PREFIX, AMD_SERIES, RAY_SERIES
from deploy.prometheus import rules
from deploy.tools import ToolMissing
from service.metrics import CATALOG
from tests.deploy.promql_names import names_in

ROOT = Path(__file__).resolve().parents[2]
FILES = dashboards.generated()
# What Prometheus adds to every series, from where it found the target.
TARGET_LABELS = {"namespace", "job", "instance", "pod"}
# Series of Prometheus itself.
OWN_SERIES = {"up": set(), "ALERTS": {"alertname", "alertstate"}}
GRAFANA_UNITS = re.compile(r"none|s|ms|percent|percentunit|reqps|bytes|Bps|celsius|watt|dtdurations|suffix: ?[a-z]+/s")


def known_series() -> dict[str, set[str]]:
    """Every series that an expression may name, and its labels."""
    known: dict[str, set[str]] = {name: set(labels) for name, labels in OWN_SERIES.items()}
    kinds = [(series.name, series.kind, series.labels) for series in CATALOG]
    kinds += [(name, "histogram" if name.endswith("_ms") else "other", labels) for name, labels in RAY_SERIES.items()]
    for name, kind, labels in kinds:
        if kind == "histogram":
            known[f"{name}_bucket"] = {*labels, "le"}
            known[f"{name}_sum"] = known[f"{name}_count"] = set(labels)
        else:
            known[name] = set(labels)
    for name in AMD_SERIES:
        known[f"{AMD_PREFIX}{name}"] = set(AMD_LABELS)
    for rule in rules.expressions():
        if rule.kind == "recording":
            known[rule.name] = names_in(rule.expr).grouped - {"le"}
    return known


KNOWN = known_series()


def check_names(expr: str) -> None:
    """Every series is known, and every label is one of the series that stand in the expression."""
    found = names_in(expr)
    assert found.series or expr == "time()", expr
    labels: set[str] = set(found.made)
    for name, matched in found.series.items():
        names = name.split("|") if "|" in name else [name]
        for each in names:
            assert each in KNOWN, f"nobody exports {each}: {expr}"
            assert matched <= KNOWN[each] | TARGET_LABELS, (each, matched, expr)
            labels |= KNOWN[each]
    assert found.grouped <= labels | TARGET_LABELS, (found.grouped, labels, expr)


def panels_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in document["panels"]:
        yield panel
        yield from panel.get("panels", [])


@pytest.fixture(params=sorted(FILES), ids=lambda path: Path(path).stem)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILES[request.param])
    return content


def test_files_are_what_the_code_makes() -> None:
    on_disk = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / dashboards.DIRECTORY).glob("*.json")}
    assert on_disk.keys() == FILES.keys()
    stale = [path for path, content in FILES.items() if on_disk[path] != content]
    assert not stale, f"run `make generate`: {stale}"


def test_four_dashboards_with_stable_ids() -> None:
    assert [Path(path).stem for path in FILES] == ["m3-service", "m3-engine", "m3-index-cache", "m3-platform"]


def test_form_that_grafana_imports(document: dict[str, Any]) -> None:
    assert document.get("id") is None and "__inputs" not in document
    assert document["schemaVersion"] >= 36
    assert document["tags"] == ["m3serve"] and document["links"][0]["tags"] == ["m3serve"]
    panels = list(panels_of(document))
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids) and min(ids) > 0
    titles = [panel["title"] for panel in panels if panel["type"] != "row"]
    # One title per kind of panel: a stat of the overview may have its time series further down.
    kinds = [(panel["title"], panel["type"]) for panel in panels]
    assert len(set(kinds)) == len(kinds) and titles
    assert {panel["type"] for panel in panels} <= {
        "row", "timeseries", "heatmap", "stat", "table", "bargauge", "state-timeline"
    }  # fmt: skip


def test_panels_tile_the_grid(document: dict[str, Any]) -> None:
    """Inside 24 columns, and no two on the same place."""
    taken: set[tuple[int, int]] = set()
    for panel in panels_of(document):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_explains_itself(document: dict[str, Any]) -> None:
    for panel in panels_of(document):
        if panel["type"] == "row":
            continue
        assert re.fullmatch(r"[A-Za-z].{20,}\.", panel["description"]), panel["title"]
        assert GRAFANA_UNITS.fullmatch(panel["fieldConfig"]["defaults"]["unit"]), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH"[: len(panel["targets"])])
        if len(panel["targets"]) > 1 and panel["type"] != "table":
            assert all(target["legendFormat"] != "__auto" for target in panel["targets"]), panel["title"]


def test_variables_stand_at_all_and_fit_a_target_without_the_label(document: dict[str, Any]) -> None:
    datasource, *others = document["templating"]["list"]
    assert datasource["type"] == "datasource" and datasource["query"] == "prometheus"
    assert "namespace" in {variable["name"] for variable in others}
    for variable in others:
        assert variable["allValue"] == ".*" and variable["current"]["value"] == "$__all"
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert query is not None and query[2] == variable["name"]
        check_names(query[1])


def test_variables_in_expressions_are_declared(document: dict[str, Any]) -> None:
    declared = {variable["name"] for variable in document["templating"]["list"]}
    for panel in panels_of(document):
        for target in panel.get("targets", []):
            used = set(re.findall(r"\$([a-z_]\w*)", target["expr"])) - {"__rate_interval", "__range"}
            assert used <= declared, target["expr"]
            # The exporter of the GPUs runs in a namespace of its own.
            assert 'namespace=~"$namespace"' in target["expr"] or AMD_PREFIX in target["expr"]


def test_legends_name_labels_that_are_there(document: dict[str, Any]) -> None:
    for panel in panels_of(document):
        for target in panel.get("targets", []):
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= names_in(target["expr"]).grouped, (panel["title"], target["legendFormat"])


def test_only_single_numbers_are_taken_over_the_whole_range(document: dict[str, Any]) -> None:
    """Over the range of a week, a value per point costs a week of samples each."""
    for panel in panels_of(document):
        for target in panel.get("targets", []):
            if "$__range" in target["expr"]:
                assert panel["type"] == "stat" and target["instant"] and not target["range"], panel["title"]


def test_tables_show_columns_that_exist(document: dict[str, Any]) -> None:
    for panel in panels_of(document):
        if panel["type"] != "table":
            continue
        values = {f"Value #{target['refId']}" for target in panel["targets"]}
        labels = set().union(*(names_in(target["expr"]).grouped for target in panel["targets"]))
        _, keep, organize = panel["transformations"]
        assert set(keep["options"]["include"]["names"]) <= values | labels, panel["title"]
        assert organize["options"]["renameByName"].keys() == set(keep["options"]["include"]["names"])
        headings = set(organize["options"]["renameByName"].values())
        assert {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]} <= headings


def test_names_exist() -> None:
    for expression in [*dashboards.expressions(), *rules.expressions()]:
        check_names(expression.expr)


def test_names_that_nobody_exports_are_found() -> None:
    with pytest.raises(AssertionError, match="nobody exports m3_indexer_second_total"):
        check_names('sum by (layer) (rate(m3_indexer_second_total{phase="decode"}[5m]))')
    with pytest.raises(AssertionError):
        check_names("sum by (rank) (rate(m3_indexer_seconds_total[5m]))")
    with pytest.raises(AssertionError):
        check_names('m3_kv_cache_usage_perc{layer="3"}')
    with pytest.raises(AssertionError):
        check_names("m3_time_to_first_token_seconds")


def test_every_series_of_ours_is_on_a_dashboard_or_in_a_rule() -> None:
    exprs = [e.expr for e in dashboards.expressions()] + [e.expr for e in rules.expressions()]
    used = set().union(*(names_in(expr).series.keys() for expr in exprs))
    unused = [
        series.name
        for series in CATALOG
        if not used & {series.name, *(f"{series.name}_{suffix}" for suffix in ("bucket", "sum", "count"))}
    ]
    assert unused == []


def test_optional_panels_are_those_of_the_gpu_exporter() -> None:
    for expression in dashboards.expressions():
        of_gpus = any(name.startswith(AMD_PREFIX) for name in names_in(expression.expr).series)
        assert expression.optional == of_gpus, expression


def test_substitute_replaces_every_variable() -> None:
    expr = 'rate(a{namespace=~"$namespace", engine=~"${engine:regex}"}[$__rate_interval]) + b{x="$x"}[$__range]'
    assert dashboards.substitute(expr, rate_interval="20s", time_range="1h", variables={"engine": "0|1"}) == (
        'rate(a{namespace=~".*", engine=~"0|1"}[20s]) + b{x=".*"}[1h]'
    )
    with pytest.raises(ValueError, match="__interval"):
        dashboards.substitute("rate(a[$__interval])")
    assert dashboards.substitute('label_replace(a, "layer", "0$1", "layer", "(.)")').count("0$1") == 1
    assert not [e for e in dashboards.expressions() if re.search(r"\$[a-z_{]", dashboards.substitute(e.expr))]


def test_expressions_parse(tmp_path: Path) -> None:
    """promtool parses rules: every query as one."""
    try:
        promtool = tools.find("promtool")
    except ToolMissing as error:
        pytest.skip(str(error))
    found = [dashboards.substitute(expression.expr) for expression in dashboards.expressions()]
    assert len(found) > 140
    listed = [{"record": f"panel:query:{number}", "expr": expr} for number, expr in enumerate(found)]
    path = tmp_path / "queries.json"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": listed}]}))
    checked = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(found)} rules found" in checked.stdout
