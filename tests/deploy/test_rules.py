"""The rules, with the real promtool: every alert fires when it should, stays silent just below, and is explained."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import tools
from deploy.grafana.dashboards import DASHBOARDS
from deploy.prometheus import rules
from deploy.prometheus.rule_file import Alert, Recording, to_yaml
from deploy.tools import ToolMissing
from service.settings import ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yaml"))
RULES = [rule for group in rules.groups() for rule in group.rules]
ALERTS = [rule for rule in RULES if isinstance(rule, Alert)]
RECORDINGS = [rule for rule in RULES if isinstance(rule, Recording)]

# Another value for every threshold, and the alerts whose cases must notice it. Two rounds: an alert may have two.
MUTATIONS: tuple[dict[str, tuple[float | str, set[str]]], ...] = (
    {
        "none_ready_for": ("3m", {"M3EngineDown"}),
        "replicas_missing_for": ("10m", {"M3EngineReplicasMissing"}),
        "stalled_for": ("1m", {"M3EngineStalled"}),
        "no_ingress_for": ("1m", {"M3NoIngress"}),
        "scrape_down_for": ("1m", {"M3ScrapeDown"}),
        "crash_loop_starts": (2, {"M3ReplicaCrashLoop"}),
        "error_ratio": (0.2, {"M3ErrorRatioHigh"}),
        "refused_ratio": (0.01, {"M3RefusalsHigh"}),
        "time_to_first_token_s": (8.0, {"M3TimeToFirstTokenHigh"}),
        "inter_token_latency_s": (0.7, {"M3InterTokenLatencyHigh"}),
        "kv_cache_usage": (0.94, {"M3KVCacheFull"}),
        "preempted_ratio": (0.03, {"M3PreemptionsHigh"}),
        "rank_skew": (0.05, {"M3RankSkewHigh"}),
        "overlap": (0.85, {"M3IndexOverlapLow"}),
        "guard_active_for": ("1m", {"M3IndexGuardActive"}),
        "guard_trips": (2, {"M3IndexGuardFlapping"}),
        "indexer_share": (0.15, {"M3IndexShareHigh"}),
    },
    {
        "min_requests": (0, {"M3ErrorRatioHigh"}),
        "latency_for": ("5m", {"M3TimeToFirstTokenHigh", "M3InterTokenLatencyHigh"}),
        "kv_cache_for": ("5m", {"M3KVCacheFull"}),
        "min_overlap_pairs": (100, {"M3IndexOverlapLow"}),
    },
)


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return tools.find("promtool")
    except ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def unit_tests() -> list[dict[str, Any]]:
    """The cases of every file of promtool tests."""
    return [
        case
        for path in sorted((PROMETHEUS / "tests").glob("*.yaml"))
        for case in yaml.safe_load(path.read_text())["tests"]
    ]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_file_is_what_the_code_makes() -> None:
    [(path, content)] = rules.generated().items()
    assert (ROOT / path).read_text() == content, "run `make generate`"


def test_file_says_what_the_code_says() -> None:
    """YAML gives back every expression and text, whatever characters are in it."""
    document = yaml.safe_load(rules.generated()[rules.PATH])
    assert [group["name"] for group in document["groups"]] == [group.name for group in rules.groups()]
    written = [rule for group in document["groups"] for rule in group["rules"]]
    assert [rule["expr"] for rule in written] == [rule.expr for rule in RULES]
    texts = {rule["alert"]: rule["annotations"] for rule in written if "alert" in rule}
    assert {name: (text["summary"], text["description"]) for name, text in texts.items()} == {
        alert.name: (alert.summary, alert.description) for alert in ALERTS
    }


def test_promtool_accepts_the_rules(promtool: Path) -> None:
    checked = run(promtool, "check", "rules", ROOT / rules.PATH)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


def test_unit_tests_pass(promtool: Path) -> None:
    tested = run(promtool, "test", "rules", *TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert tested.stdout.count("SUCCESS") == len(TESTS) > 0


def test_every_alert_fires_and_stays_silent_in_a_test(unit_tests: list[dict[str, Any]]) -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for case in unit_tests:
        for check in case.get("alert_rule_test", []):
            (fires if check["exp_alerts"] else silent).add(check["alertname"])
    names = {alert.name for alert in ALERTS}
    assert fires == names and silent == names


def test_every_recording_is_read_by_a_test_or_an_alert(unit_tests: list[dict[str, Any]]) -> None:
    asked = " ".join(check["expr"] for case in unit_tests for check in case.get("promql_expr_test", []))
    used = asked + " ".join(rule.expr for rule in RULES)
    assert [rule.name for rule in RECORDINGS if not re.search(rf"(?<![\w:]){rule.name}(?![\w:])", used)] == []


@pytest.mark.parametrize("mutations", MUTATIONS, ids=["first", "second"])
def test_unit_tests_notice_other_thresholds(
    promtool: Path, tmp_path: Path, mutations: dict[str, tuple[float | str, set[str]]]
) -> None:
    """The cases stand close to the thresholds: they are no decoration."""
    limits = dataclasses.replace(rules.Thresholds(), **{field: value for field, (value, _) in mutations.items()})
    (tmp_path / "rules.yaml").write_text(to_yaml(rules.groups(limits)))
    shutil.copytree(PROMETHEUS / "tests", tmp_path / "tests")
    tested = run(promtool, "test", "rules", *sorted((tmp_path / "tests").glob("*.yaml")))
    assert tested.returncode == 1
    noticed = set(re.findall(r"alertname: (\w+)", tested.stdout + tested.stderr))
    assert noticed == set().union(*(alerts for _, alerts in mutations.values()))


def test_every_threshold_is_changed_in_that_test() -> None:
    changed = set().union(*(mutations.keys() for mutations in MUTATIONS))
    assert changed == {field.name for field in dataclasses.fields(rules.Thresholds)}


def test_runbook_has_a_section_for_every_alert_and_no_other() -> None:
    runbook = (ROOT / "deploy" / "RUNBOOK.md").read_text()
    sections = re.split(r"^## ", runbook, flags=re.MULTILINE)[1:]
    titles = [section.partition("\n")[0] for section in sections]
    assert [title for title in titles if title.startswith("M3")] == [alert.name for alert in ALERTS]
    for section in sections:
        if section.startswith("M3"):
            for part in ("**Meaning.**", "**First look.**", "**Fix.**"):
                assert section.count(part) == 1, (section[:40], part)


def test_severities_and_texts() -> None:
    assert {alert.severity for alert in ALERTS} == {"critical", "warning", "info"}
    for alert in ALERTS:
        assert not alert.summary.endswith(".") and alert.description.endswith("."), alert.name


def test_runbook_names_panels_and_settings_that_exist() -> None:
    runbook = (ROOT / "deploy" / "RUNBOOK.md").read_text()
    quoted = {re.sub(r"\s+", " ", text) for text in re.findall(r'"([^"]+)"', re.sub(r"`[^`]+`", "", runbook))}
    titles = {dashboard.title for dashboard in DASHBOARDS}
    titles |= {panel.title for dashboard in DASHBOARDS for row in dashboard.rows for panel in row.panels}
    assert quoted - titles == set()
    words = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:: ?[\w]+)?`", runbook))
    settings = set(ServiceSettings.model_fields) | {field.name for field in dataclasses.fields(rules.Thresholds)}
    assert words - settings - {"engine_unavailable", "generation_failed", "internal_error"} == set()
    assert len(words) > 10
    anchors = {f"#{alert.name.lower()}" for alert in ALERTS}
    assert set(re.findall(r"\]\((#[^)]+)\)", runbook)) <= anchors
    for link in re.findall(r"\]\(([^#)]+)\)", runbook):
        assert (ROOT / "deploy" / link).is_file(), link
