"""A real Prometheus on the real service: every expression of dashboards and rules has data, and rates are right.

Two ingress and two engine replicas of two ranks serve closed-loop clients while one engine replica is killed. With
M3_PROOF_REPORT=FILE every expression is written there with the value that it had.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from deploy import tools
from deploy.tools import ToolMissing
from service.metrics import CATALOG
from service.prometheus import Prometheus, configuration
from tests.cluster import Cluster, free_port, wait_until
from tests.deploy.proof import SCRAPE_S, Proof, is_plausible, run
from tests.load import Load

MODEL = "proved"
MINE = f'model_name="{MODEL}"'
COMPLETIONS = 'route="/v1/completions"'
# Until the exporter is asked again, and a killed process is gone.
MOURNING_S = 2 * SCRAPE_S


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes the cluster's two endpoints every second, and evaluates the rules as often."""
    try:
        for name in ("prometheus", "promtool"):
            tools.find(name)
    except ToolMissing as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("prometheus")
    targets = {"m3serve": cluster.metrics_url, "ray": cluster.ray_metrics}
    config = configuration(targets, scrape_interval=f"{SCRAPE_S:g}s")
    with Prometheus(config, directory, port=free_port()) as started:
        started.wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def proof(cluster: Cluster, checkpoint: Path, prometheus: Prometheus) -> Iterator[Proof]:
    """Plan DDFSF, audited; probed and audited on every step; long prompts, so that selections differ."""
    settings = cluster.settings(
        checkpoint,
        served_model_name=MODEL,
        ingress_replicas=2,
        replicas=2,
        tensor_parallel_size=2,
        max_model_len=2048,
        max_num_seqs=4,
        max_queued_requests=4,
        num_pages=40,
        index_topk_freq=2,
        index_reuse="audited",
        audit_interval=1,
        probe_interval=1,
    )
    with cluster.service(settings) as url:
        seen = Proof(prometheus, Load(url, MODEL), cluster.metrics_url)
        both = f"count(m3_engine_info{{{MINE}}}) == 2"
        wait_until(lambda: bool(prometheus.query(both)), timeout_s=60, what="two engine replicas")
        asyncio.run(run(seen))
        seen.evaluate_everything()
        if report := os.environ.get("M3_PROOF_REPORT"):
            write_report(seen, Path(report))
        yield seen


def comparisons(proof: Proof) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """What is compared -> counts by the clients, and by the rates of a panel."""
    load = proof.load
    return {
        "answers by status": (
            dict(load.statuses),
            proof.panel_counts("m3-service", "Requests by status", "status"),
        ),
        "choices by finish reason": (
            dict(load.finished),
            proof.panel_counts("m3-service", "Finish reasons", "finished_reason"),
        ),
        "refusals by code": (dict(load.refused), proof.panel_counts("m3-service", "Refusals by code", "code")),
        "tokens": ({"": load.tokens}, proof.panel_counts("m3-service", "Delivered tokens", "")),
    }


def write_report(proof: Proof, path: Path) -> None:
    lines = [f"load of {proof.window_s:.3f} s / by the clients / by the panel's rates, times that"]
    for what, (counted, rated) in comparisons(proof).items():
        lines.append(f"{what} / {counted} / { {name: round(value, 3) for name, value in rated.items()} }")
    wider = f"sum(increase(m3_delivered_tokens_total{{{MINE}}}[{round(proof.window_s * 1000) + 700}ms]))"
    [(_, tokens)] = proof.prometheus.query(wider, at_s=proof.end_s + 0.35)
    lines.append(f"tokens, in a window 0.7 s wider, into which increase() extrapolates / {tokens:.1f}")
    lines += ["where / name / expression / value / unit", *sorted(e.line() for e in proof.evaluated)]
    path.write_text("\n".join(lines) + "\n")


def test_every_panel_and_rule_has_data_of_its_unit(proof: Proof) -> None:
    assert len(proof.evaluated) > 150
    wrong = []
    for evaluated in proof.evaluated:
        if evaluated.error or (not evaluated.value and not evaluated.optional):
            wrong.append(evaluated.line())
        for vector in (evaluated.value, evaluated.result):
            if not all(is_plausible(evaluated.unit, labels, value) for labels, value in vector):
                wrong.append(evaluated.line())
    assert not wrong, "\n".join(wrong)


def test_rules_run_without_errors_and_the_restart_fires_alone(proof: Proof) -> None:
    groups = proof.prometheus.api("rules")["groups"]
    health = {rule["name"]: (rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]}
    assert {name: found for name, found in health.items() if found != ("ok", None)} == {}
    firing = {labels["alertname"] for labels, _ in proof.query('ALERTS{alertstate="firing"}')}
    assert firing == {"M3ReplicaRestarts"}


def test_rates_are_those_that_the_clients_saw(proof: Proof) -> None:
    """Within 1 %: only the client that leaves may have been sent more than it counted."""
    load = proof.load
    assert load.statuses.keys() == {"200", "400", "404", "429"} and load.finished.keys() == {"length", "abort"}
    assert load.streams > 1
    for what, (counted, rated) in comparisons(proof).items():
        assert rated == pytest.approx(counted, rel=0.01), what
    choices = proof.grown(f"m3_time_to_first_token_seconds_count{{{MINE}}}", "model_name")[MODEL]
    assert choices == pytest.approx(load.finished.total(), rel=0.01)
    # The clients' clocks start before the service's and stop after them, save for the client that leaves.
    seconds = proof.grown(f"m3_e2e_request_latency_seconds_sum{{{MINE}}}", "model_name")[MODEL]
    assert load.choice_s / 20 < seconds < load.choice_s + 1.0


def test_index_cache_panels_follow_from_the_plan(proof: Proof) -> None:
    [(_, rate)] = proof.panel("m3-index-cache", "Skip rate")
    # A replica that is killed may have published the selections of some layers only.
    assert rate == pytest.approx(1 / 3, rel=0.05)
    by_layer = {int(labels["layer"]): value for labels, value in proof.panel("m3-index-cache", "Skip rate by layer")}
    assert by_layer == {2: 0.0, 3: 1.0, 4: 0.0}
    measured = {int(labels["layer"]) for labels, _ in proof.panel("m3-index-cache", "Indexer, decode, by layer")}
    assert measured >= {2, 4}
    [(labels, overlap)] = proof.panel("m3-index-cache", "Overlap by layer")
    assert int(labels["layer"]) == 3 and 0 < overlap < 1


def test_counters_never_fall_and_no_series_is_missing(proof: Proof) -> None:
    """What a scraper sees, sample by sample, over the death of a replica."""
    kinds = {}
    for series in CATALOG:
        suffixes = ("_bucket", "_sum", "_count") if series.kind == "histogram" else ("",)
        kinds |= {f"{series.name}{suffix}": series.kind for suffix in suffixes}
    found = set()
    for labels, samples in proof.matrix('{job="m3serve", __name__=~"m3_.+"}'):
        name = labels["__name__"]
        found.add(name)
        if kinds[name] != "gauge":
            values = [value for _, value in samples]
            falls = [(a, b) for a, b in pairwise(values) if b < a]
            assert not falls, (labels, falls)
    assert found == kinds.keys()


def test_gauges_of_the_dead_replica_go_and_come_back(proof: Proof) -> None:
    starts = {labels["engine"]: value for labels, value in proof.query(f"m3_engine_start_time_seconds{{{MINE}}}")}
    assert starts.keys() == {"0", "1"}
    [(killed, back_s)] = [(slot, start_s) for slot, start_s in starts.items() if start_s > proof.killed_s]
    gauges = {series.name for series in CATALOG if series.kind == "gauge" and "engine" in series.labels}
    seen: dict[str, set[str]] = defaultdict(set)
    for labels, samples in proof.matrix(f'{{{MINE}, engine="{killed}"}}'):
        if labels["__name__"] in gauges:
            seen[labels["__name__"]] |= {
                "before" if stamp < proof.killed_s else "after" if stamp > back_s else "dead"
                for stamp, _ in samples
                if not proof.killed_s < stamp < proof.killed_s + MOURNING_S
            }
    assert seen == {name: {"before", "after"} for name in gauges}
    assert [value for _, value in proof.query(f"m3_num_requests_running{{{MINE}}}")] == [0.0, 0.0]
    assert [value for _, value in proof.query(f"m3_engine_open_requests{{{MINE}}}")] == [0.0, 0.0]


def test_the_death_shows_where_it_should(proof: Proof) -> None:
    moved = proof.grown(f"m3_failovers_total{{{MINE}}}", "cause")
    assert moved.keys() == {"replica_lost"} and round(moved["replica_lost"]) >= 1
    recovered = proof.grown(f"m3_failover_seconds_count{{{MINE}}}", "model_name")
    assert recovered[MODEL] <= moved["replica_lost"] + 0.01
    assert proof.query(f"sum(m3_failovers_given_up_total{{{MINE}}})") == [({}, 0.0)]
