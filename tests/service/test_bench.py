"""`m3serve bench` as a person runs it: what it counts, and what it says when it cannot measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service import cli
from tests.cluster import Cluster, free_port, wait_until


def test_offline(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    cases = ["--prefill-tokens", "40", "--decode-batches", "1,3", "--context-tokens", "20", "--decode-steps", "4"]
    arguments = ["--model", str(checkpoint), "--repeats", "1", "--num-threads", "1", "--dtype", "float32"]
    assert cli.main(["bench", "offline", *arguments, *cases, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [(row["case"], row["batch"], row["context_tokens"]) for row in document["rows"]] == [
        ("prefill", 1, 40),
        ("decode", 1, 20),
        ("decode", 3, 20),
    ]
    for row in document["rows"]:
        tokens = row["context_tokens"] if row["case"] == "prefill" else row["batch"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["median_ms"] * 1e3)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "outside_forward" in printed.err


def test_http(cluster: Cluster, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = cluster.settings(checkpoint, served_model_name="bench")
    with cluster.service(settings) as url:
        sizes = ["--streams", "2", "--requests", "5", "--input-tokens", "12", "--output-tokens", "7"]
        target = ["--url", f"{url}/v1", "--metrics-url", cluster.metrics_url, "--max-token-id", "400"]
        target += ["--out", str(tmp_path / "bench.json")]
        wait_until(lambda: cli.main(["bench", "http", *target, *sizes]) == 0, timeout_s=60, what="a measured run")
        document = json.loads((tmp_path / "bench.json").read_text())
        assert cli.main(["bench", "http", *target, "--model", "other"]) == 2
        assert "--model other" in capsys.readouterr().err
    assert (document["model"], document["requests"], document["failed"]) == ("bench", 5, 0)
    assert document["output_tokens_per_s"] * document["wall_s"] == pytest.approx(5 * 7)
    assert document["total_tokens_per_s"] * document["wall_s"] == pytest.approx(5 * (7 + 12))
    assert set(document["cpu_s_per_1k_tokens"]) >= {"ingress", "engine"}
    assert 0 < document["ttft_s"]["median"] <= document["e2e_s"]["median"] <= document["wall_s"]


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    assert cli.main(["bench", "http", "--url", url]) == 1
    assert f"error: {url} cannot be measured" in capsys.readouterr().err
