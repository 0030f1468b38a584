"""The series of the whole service, scraped from the exporter while real requests run."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray import serve
from ray.serve.handle import DeploymentHandle

from service.metrics import CATALOG
from tests.cluster import Cluster, wait_until

PROMPT = list(range(10, 410)) * 3
NUM_TOKENS = 20
PHASES = ("prefill", "decode")


class Scrape:
    """One scrape; `get` sums the samples that match."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=5) as reply:
            text = reply.read().decode()
        self.samples: list[Sample] = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def get(self, name: str, **labels: str) -> float:
        return math.fsum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())

    def find(self, name: str) -> list[Sample]:
        return [s for s in self.samples if s.name == name]

    def values(self, name: str, label: str, **labels: str) -> set[str]:
        found = (s for s in self.samples if s.name == name and labels.items() <= s.labels.items() and s.value > 0)
        return {s.labels[label] for s in found}


BODY = {"model": "counted", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def client(cluster: Cluster, checkpoint: Path) -> Iterator[httpx.Client]:
    """Plan DDFSF, audited; probed and audited on every step."""
    settings = cluster.settings(
        checkpoint,
        served_model_name="counted",
        max_model_len=2048,
        num_pages=64,
        index_topk_freq=2,
        index_reuse="audited",
        audit_interval=1,
        probe_interval=1,
    )
    with cluster.service(settings) as url, httpx.Client(base_url=url, timeout=60.0) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, timeout_s=20, what="ready")
        yield client


@pytest.fixture(scope="module")
def scrapes(cluster: Cluster, client: httpx.Client) -> tuple[Scrape, Scrape]:
    """Before and after: the same prompt twice (the second streamed), then one refusal of each kind."""
    before = Scrape(cluster.metrics_url)
    assert client.post("/v1/completions", json=BODY).status_code == 200
    with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as reply:
        assert reply.read().endswith(b"data: [DONE]\n\n")
    assert client.post("/v1/completions", json=BODY | {"max_tokens": 4000}).status_code == 400
    assert client.post("/v1/completions", json=BODY | {"model": "other"}).status_code == 404

    def at_rest() -> bool:
        now = Scrape(cluster.metrics_url)
        answers = grown((before, now), "m3_http_requests_total", route="/v1/completions")
        ended = now.get("m3_request_success_total", model_name="counted")
        busy = now.get("m3_num_requests_running", model_name="counted")
        return (busy, ended, answers) == (0, 2, 4)

    wait_until(at_rest, timeout_s=5, what="an idle service")
    return before, Scrape(cluster.metrics_url)


def grown(scrapes: tuple[Scrape, Scrape], name: str, **labels: str) -> float:
    return scrapes[1].get(name, **labels) - scrapes[0].get(name, **labels)


def test_tokens_and_requests_are_counted_exactly(scrapes: tuple[Scrape, Scrape]) -> None:
    cached = 128 * (len(PROMPT) // 128)
    counted = {"model_name": "counted"}
    assert grown(scrapes, "m3_generation_tokens_total", **counted) == 2 * NUM_TOKENS
    assert grown(scrapes, "m3_prompt_tokens_total", **counted) == 2 * len(PROMPT) - cached
    assert grown(scrapes, "m3_prefix_cache_hits_total", **counted) == cached
    assert grown(scrapes, "m3_prefix_cache_queries_total", **counted) == 2 * len(PROMPT)
    assert grown(scrapes, "m3_request_success_total", finished_reason="length", **counted) == 2
    assert grown(scrapes, "m3_request_prompt_tokens_sum", **counted) == 2 * len(PROMPT)
    assert grown(scrapes, "m3_request_generation_tokens_sum", **counted) == 2 * NUM_TOKENS
    # Each prompt's last token is the first decode step's input, and the last sampled token is never run.
    assert grown(scrapes, "m3_iteration_tokens_sum", **counted) == 2 * (len(PROMPT) + NUM_TOKENS - 1) - cached
    assert grown(scrapes, "m3_num_preemptions_total", **counted) == 0


def test_times_are_observed_once_per_request(scrapes: tuple[Scrape, Scrape]) -> None:
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert grown(scrapes, f"m3_{name}_seconds_count", model_name="counted") == 2, name
    assert grown(scrapes, "m3_request_decode_time_seconds_count", model_name="counted") == 2
    e2e = grown(scrapes, "m3_e2e_request_latency_seconds_sum")
    engine = sum(grown(scrapes, f"m3_request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode"))
    assert 0 < engine < e2e
    steps = grown(scrapes, "m3_engine_step_seconds_sum")
    model = grown(scrapes, "m3_forward_seconds_total")
    assert 0 < model < steps < e2e
    assert 0 < grown(scrapes, "m3_python_seconds_total") < steps
    assert grown(scrapes, "m3_inter_token_latency_seconds_count") >= 1


def test_answers_are_counted_by_route_and_status(scrapes: tuple[Scrape, Scrape]) -> None:
    for status, count in (("200", 2), ("400", 1), ("404", 1)):
        assert grown(scrapes, "m3_http_requests_total", route="/v1/completions", status=status) == count
    assert grown(scrapes, "m3_refusals_total", code="context_length_exceeded") == 1


def test_layers_report_what_the_indexer_did(scrapes: tuple[Scrape, Scrape]) -> None:
    after = scrapes[1]
    assert after.get("m3_engine_info", plan="DDFSF", model_name="counted") == 1
    assert after.get("m3_cache_config_info", num_pages="64", page_size="128", model_name="counted") == 1
    counted = {"model_name": "counted"}
    assert after.values("m3_index_selections_total", "layer", role="compute", **counted) == {"2", "4"}
    assert after.values("m3_index_selections_total", "layer", role="reuse", **counted) == {"3"}
    steps = after.get("m3_engine_step_seconds_count", **counted)
    for layer, role in (("2", "compute"), ("3", "reuse"), ("4", "compute")):
        assert after.get("m3_index_selections_total", layer=layer, role=role, **counted) == steps
    for phase in ("prefill", "decode"):
        assert {"2", "4"} <= after.values("m3_indexer_seconds_total", "layer", phase=phase, **counted)
        assert after.values("m3_sparse_attention_seconds_total", "layer", phase=phase, **counted) == {"2", "3", "4"}
    assert after.get("m3_indexer_samples_total", layer="2", **counted) == steps
    pairs = after.get("m3_index_overlap_count_total", layer="3", **counted)
    overlap = after.get("m3_index_overlap_sum_total", layer="3", **counted)
    assert after.values("m3_index_overlap_count_total", "layer", **counted) == {"3"}
    assert 0 < overlap <= pairs


def test_gauges_return_to_rest(scrapes: tuple[Scrape, Scrape]) -> None:
    for name in ("m3_num_requests_running", "m3_num_requests_waiting", "m3_kv_cache_usage_perc"):
        assert [s.value for s in scrapes[1].samples if s.name == name and s.labels["model_name"] == "counted"] == [0.0]


def test_every_series_is_in_the_catalog_and_has_its_labels(scrapes: tuple[Scrape, Scrape]) -> None:
    known = {series.name: series for series in CATALOG}
    for sample in scrapes[1].samples:
        name = sample.name if sample.name in known else re.sub("_(bucket|sum|count)$", "", sample.name)
        assert sample.labels.keys() - {"le"} == set(known[name].labels), sample


# What needs a fault, a text prompt, a grammar or a second rank.
NOT_SEEN = {
    *("m3_rank_collective_seconds_total", "m3_index_guard_trips_total"),
    *("m3_failovers_given_up_total", "m3_failover_seconds", "m3_failovers_total", "m3_engine_deaths_total"),
    *("m3_submits_not_accepted_total", "m3_token_mismatches_total"),
    *("m3_page_check_failures_total", "m3_requests_not_finite_total"),
    *("m3_grammars_total", "m3_grammar_compile_seconds", "m3_guided_tokens_total", "m3_guided_mask_seconds_total"),
    *(
        "m3_requests_not_guided_total",
        "m3_dropped_messages_total",
        "m3_tokenize_seconds",
        "m3_num_preemptions_total",
        "m3_page_evictions_total",
    ),
}


def test_every_series_of_the_catalog_is_there_from_the_start(scrapes: tuple[Scrape, Scrape]) -> None:
    """A rate needs a value to grow from: what did not happen yet is 0, not absent."""
    there = {re.sub("_(bucket|sum|count)$", "", s.name) for s in scrapes[1].samples} | {
        s.name for s in scrapes[1].samples
    }
    assert {series.name for series in CATALOG} - there == set()
    grew = {s.name for s in scrapes[1].samples if s.value > 0}
    idle = {"m3_http_requests_in_flight", *(s.name for s in scrapes[1].samples if s.name.startswith("m3_num_requests"))}
    for series in CATALOG:
        if series.name not in NOT_SEEN | idle:
            assert {series.name, f"{series.name}_count"} & grew or series.kind == "gauge", series.name


def test_pages_ranks_and_delivery_are_counted(scrapes: tuple[Scrape, Scrape]) -> None:
    counted = {"model_name": "counted"}
    after = scrapes[1]
    assert sum(after.get("m3_kv_pages", state=state, **counted) for state in ("held", "cached", "blank")) == 64
    # Two prompts of nine full pages, the same ones, and what each generated beyond.
    assert after.get("m3_kv_pages", state="cached", **counted) == len(PROMPT) // 128
    assert grown(scrapes, "m3_delivered_tokens_total", **counted) == 2 * NUM_TOKENS
    scheduled = {phase: grown(scrapes, "m3_scheduled_tokens_total", phase=phase, **counted) for phase in PHASES}
    assert scheduled["decode"] == 2 * (NUM_TOKENS - 1)
    assert sum(scheduled.values()) == grown(scrapes, "m3_iteration_tokens_sum", **counted)
    steps = grown(scrapes, "m3_engine_step_seconds_count", **counted)
    assert grown(scrapes, "m3_rank_samples_total", rank="0", **counted) == steps
    forward_s = grown(scrapes, "m3_forward_seconds_total", **counted)
    assert grown(scrapes, "m3_rank_forward_seconds_total", rank="0", **counted) == pytest.approx(forward_s)
    assert grown(scrapes, "m3_rank_collective_seconds_total", rank="0", **counted) == 0
    assert 0 < grown(scrapes, "m3_plan_seconds_total", **counted) < grown(scrapes, "m3_engine_step_seconds_sum")
    roles = {(s.labels["layer"], s.labels["role"], s.labels["source"]) for s in after.find("m3_index_layer_info")}
    dense = {("0", "dense", ""), ("1", "dense", "")}
    assert roles == dense | {("2", "compute", "2"), ("3", "reuse", "2"), ("4", "compute", "4")}
    assert after.get("m3_configured_engine_replicas", **counted) == after.get("m3_ingress_replicas", **counted) == 1
    assert after.get("m3_kv_cache_bytes", **counted) > 0 and after.get("m3_weight_bytes", **counted) > 0
    # Of the two requests one streamed; the other one's tokens went out at once.
    assert grown(scrapes, "m3_request_time_per_output_token_seconds_count", **counted) == 1
    assert grown(scrapes, "m3_submit_requests_sum", **counted) == 3  # the third was refused by the engine


def test_neither_stream_nor_counters_notice_the_death_of_a_replica(
    cluster: Cluster, client: httpx.Client, scrapes: tuple[Scrape, Scrape]
) -> None:
    body = BODY | {"max_tokens": 300, "stream": True, "return_token_ids": True}

    def run(kill: list[int]) -> list[int]:
        token_ids: list[int] = []
        last = ""
        with client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            for line in filter(None, reply.iter_lines()):
                last = line
                if line.startswith("data: {"):
                    [choice] = json.loads(line.removeprefix("data: "))["choices"]
                    token_ids += choice["token_ids"]
                if kill and len(token_ids) > 20:
                    os.kill(kill.pop(), signal.SIGKILL)
        assert last == "data: [DONE]"
        return token_ids

    expected = run([])
    before = Scrape(cluster.metrics_url)
    handle = serve.get_deployment_handle("Engine", "service")
    victim = asyncio.run(_replica_pid(handle))
    assert run([victim]) == expected
    assert asyncio.run(_replica_pid(handle)) != victim
    after = Scrape(cluster.metrics_url)
    counted = {"model_name": "counted"}
    assert grown((before, after), "m3_failovers_total", cause="replica_lost", **counted) == 1
    assert grown((before, after), "m3_failover_seconds_count", **counted) == 1
    assert grown((before, after), "m3_failovers_given_up_total", **counted) == 0
    assert grown((before, after), "m3_delivered_tokens_total", **counted) == 300
    # The replacement's word, not the sum of both lives.
    assert after.find("m3_engine_start_time_seconds") != before.find("m3_engine_start_time_seconds")
    assert len(after.find("m3_engine_start_time_seconds")) == 1
    assert grown((before, after), "m3_request_success_total", **counted) == 1
    tokens = grown((before, after), "m3_generation_tokens_total", **counted)
    # What the dead replica had sampled and not sent is sampled again; what it had not published, half a second's, is
    # lost.
    assert 200 <= tokens <= 320
    wait_until(
        lambda: Scrape(cluster.metrics_url).get("m3_num_requests_running", **counted) == 0,
        timeout_s=5,
        what="an idle engine",
    )


async def _replica_pid(handle: DeploymentHandle) -> int:
    pids: list[int] = await handle.pids.remote()
    return pids[0]


def test_exporter_command_starts_clean_and_stops_on_sigterm(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").write_bytes(b"left by another life")
    process = subprocess.Popen(
        [sys.executable, "-m", "service.exporter", "--dir", str(tmp_path), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+/metrics", line)
        assert match is not None, line
        with urllib.request.urlopen(match[0], timeout=5) as reply:
            assert reply.status == 200
        assert list(tmp_path.glob("*.db")) == []
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
