"""What an HTTP client sees when the engine behind its stream is lost and may not be replaced for it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray import serve

from tests.cluster import Cluster, wait_until

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def url(cluster: Cluster, checkpoint: Path) -> Iterator[str]:
    settings = cluster.settings(checkpoint, retry_limit=0, submit_timeout_s=2.0)
    with cluster.service(settings) as base:
        wait_until(lambda: httpx.get(f"{base}/ready").status_code == 200, timeout_s=30, what="readiness")
        yield base


def series(cluster: Cluster, name: str) -> float:
    text = httpx.get(cluster.metrics_url).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def test_a_lost_engine_is_an_error_in_the_stream_then_503_then_over(cluster: Cluster, url: str) -> None:
    deaths, given_up = series(cluster, "m3_engine_deaths_total"), series(cluster, "m3_failovers_given_up_total")
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}
    engine = serve.get_deployment_handle("Engine", "service")
    _replica, worker = engine.pids.remote().result(timeout_s=TIMEOUT_S)
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        assert "choices" in next(lines)
        os.kill(worker, signal.SIGKILL)
        rest = list(lines)
    *chunks, error, done = rest
    assert done == "data: [DONE]" and rest.count(done) == 1
    assert all('"choices":[{' in chunk for chunk in chunks)
    detail = json.loads(error.removeprefix("data: "))["error"]
    assert (detail["type"], detail["code"]) == ("service_unavailable_error", "engine_unavailable")

    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503, timeout_s=20, what="the loss to be noticed")
    assert httpx.get(f"{url}/health").status_code == 200, "the ingress itself lives"
    # A worker takes longer to start than submit_timeout_s.
    refused = httpx.post(f"{url}/v1/completions", json={**body, "max_tokens": 2}, timeout=TIMEOUT_S)
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "engine_unavailable"

    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200, timeout_s=TIMEOUT_S, what="the replacement")
    answer = httpx.post(f"{url}/v1/completions", json={**body, "max_tokens": 2}, timeout=TIMEOUT_S)
    assert answer.status_code == 200
    # Counted by the replica as it died; its replacement goes on from there.
    assert series(cluster, "m3_engine_deaths_total") == deaths + 1
    # The stream, and perhaps the refused request: it may have met the replica as it died.
    assert series(cluster, "m3_failovers_given_up_total") in (given_up + 1, given_up + 2)
