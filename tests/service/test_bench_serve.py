"""`m3serve bench serve`: what it sends, when, and what it counts; on a real service and on servers that misbehave."""

from __future__ import annotations

import json
import math
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.tokenizer import Tokenizer
from service import cli
from service.bench.serving import workload
from service.bench.serving.client import Outcome
from service.bench.serving.load import arrival_times
from service.bench.serving.sse import EventDecoder
from service.bench.serving.statistics import percentiles, summarise
from service.bench.serving.workload import Component, TokenSource
from tests.cluster import LOOPBACK, Cluster, free_port, wait_until

KEY = "sk-of-the-endpoint-alone"
EVENT = b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": null}]}\n\n'
LAST = (
    b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}\n\n'
    b"data: [DONE]\n\n"
)
ERROR = b'data: {"error": {"message": "gone", "type": "server_error", "code": "engine_unavailable"}}\n\n'


# --- events ------------------------------------------------------------------------------------------

_PAYLOADS = st.lists(st.text(st.characters(exclude_characters="\r\n"), min_size=1), min_size=1, max_size=5)


@given(_PAYLOADS, st.sampled_from([b"\n", b"\r\n", b"\r"]), st.data())
def test_events_survive_any_cut(payloads: list[str], end: bytes, data: st.DataObject) -> None:
    """Multi-line data, comments and other fields among them; cut anywhere, between CR and LF too."""
    expected = [payload.encode() for payload in payloads]
    whole = b": a comment" + end
    for i, payload in enumerate(expected):
        lines = [payload, b"second"] if i % 2 else [payload]
        expected[i] = b"\n".join(lines)
        whole += b"event: x" + end + b"".join(b"data: " + line + end for line in lines) + end
    places = data.draw(st.lists(st.integers(0, len(whole)), max_size=8))
    cuts = [0, *sorted(places), len(whole)]
    decoder = EventDecoder()
    found = [event for low, high in pairwise(cuts) for event in decoder.feed(whole[low:high])]
    assert found == expected


def test_events_byte_by_byte() -> None:
    decoder = EventDecoder()
    whole = EVENT.replace(b"\n", b"\r\n") + LAST + b"data: never ended\n"
    found = [event for byte in whole for event in decoder.feed(bytes([byte]))]
    assert [json.loads(event)["choices"][0]["text"] for event in found[:2]] == ["x", "x"]
    assert found[3:] == [b"[DONE]"]


# --- times -------------------------------------------------------------------------------------------


def test_arrivals() -> None:
    poisson = [t or 0.0 for t in arrival_times(2000, rate=5, burstiness=1, seed=1)]
    gaps = [late - early for early, late in pairwise(poisson)]
    mean = sum(gaps) / len(gaps)
    assert poisson[0] == 0 and mean == pytest.approx(1 / 5, rel=0.1)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1)
    assert arrival_times(2000, rate=5, burstiness=1, seed=1) == poisson
    assert arrival_times(2000, rate=5, burstiness=1, seed=2) != poisson
    assert arrival_times(4, rate=2, burstiness=math.inf, seed=0) == [0, 0.5, 1.0, 1.5]
    assert arrival_times(2, rate=math.inf, burstiness=1, seed=0) == [None, None]


# --- workloads ---------------------------------------------------------------------------------------


def source(*, as_text: bool = False, tokenizer: Tokenizer | None = None) -> TokenSource:
    return TokenSource(random.Random(0), max_token_id=400, as_text=as_text, tokenizer=tokenizer)


def token_ids(prompt: workload.Prompt) -> list[int]:
    assert isinstance(prompt.content, msgspec.Raw)
    return msgspec.json.decode(prompt.content, type=list[int])


def test_lengths_are_spread_by_the_ratio() -> None:
    prompts = workload.random_prompts(300, source(), random.Random(0), input_tokens=100, output_tokens=10, ratio=0.5)
    lengths = [prompt.input_tokens for prompt in prompts]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert {prompt.output_tokens for prompt in prompts} == set(range(5, 16))
    assert all(len(token_ids(prompt)) == prompt.input_tokens for prompt in prompts)


def test_groups_share_their_prefix_and_nothing_else() -> None:
    prompts = workload.shared_prefix_prompts(
        9, source(), random.Random(0), num_prefixes=3, prefix_tokens=20, input_tokens=8, output_tokens=4, ratio=0
    )
    heads = {(prompt.group, tuple(token_ids(prompt)[:20])) for prompt in prompts}
    assert len(heads) == 3 and [sum(p.group == i for p in prompts) for i in range(3)] == [3, 3, 3]
    assert len({tuple(token_ids(prompt)[20:]) for prompt in prompts}) == 9


def test_a_mix_follows_its_weights() -> None:
    parts = [Component(10, 1, 7), Component(20, 2, 2), Component(30, 3, 1)]
    prompts = workload.mixed_prompts(50, source(as_text=True), random.Random(0), components=parts, ratio=0)
    assert [sum(prompt.group == i for prompt in prompts) for i in range(3)] == [35, 10, 5]
    for prompt in prompts:
        part = parts[prompt.group]
        assert (prompt.input_tokens, prompt.output_tokens) == (part.input_tokens, part.output_tokens)
        assert isinstance(prompt.content, str) and len(prompt.content.split()) == part.input_tokens
    assert [prompt.group for prompt in prompts] != sorted(prompt.group for prompt in prompts)


def test_sharegpt(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "sharegpt.json"
    conversations = [
        {"conversations": [{"from": "human", "value": "q" * 40}, {"from": "gpt", "value": "a" * 80}]},
        {"messages": [
            {"role": "system", "content": "s" * 400},
            {"role": "user", "content": "r" * 60},
            {"role": "assistant", "content": "b" * 120},
        ]},
        {"conversations": [{"from": "human", "value": "too long" * 100}, {"from": "gpt", "value": "a" * 80}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "short" * 10}]},
        {"conversations": [{"from": "gpt", "value": "no question" * 10}, {"from": "human", "value": "x" * 40}]},
        "no conversation",
    ]  # fmt: skip
    path.write_text(json.dumps(conversations))

    def read(count: int, tokenizer: Tokenizer | None = None, limit: int = 100) -> list[workload.Prompt]:
        return workload.sharegpt_prompts(
            path, count, random.Random(0), tokenizer=tokenizer, output_tokens=None, max_input_tokens=limit
        )

    assert {(str(p.content)[0], p.input_tokens, p.output_tokens) for p in read(2)} == {("q", 10, 20), ("r", 15, 30)}
    assert len(read(5)) == 5
    tokenizer = Tokenizer.from_dir(checkpoint)
    for prompt in read(2, tokenizer, limit=1000):
        assert prompt.input_tokens == len(tokenizer.encode(str(prompt.content)))
    with pytest.raises(ConfigError, match="none of 4 conversations has a question of 4 to 5 tokens"):
        read(2, limit=5)
    for content, message in [("[1", "is not JSON"), ("{}", "must hold a list"), ("[]", "none of 0 entries")]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read(1)


# --- counting ----------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    fast = Outcome(None, 0.0, 1.0, [0.1, 0.2, 0.4], prompt_tokens=7, output_tokens=4, is_counted=True)
    slow = Outcome(None, 0.0, 2.0, [1.0], prompt_tokens=7, output_tokens=1, is_counted=True)
    lost = Outcome(None, 0.0, 2.0, [0.1])
    lost.fail("timeout", "no end")
    found = summarise([fast, slow, lost], 2.0, shares=[50], goals_ms={"ttft": 500, "tpot": 101})
    assert (found["completed"], found["failed"], found["output_tokens"]) == (2, 1, 5)
    assert found["errors"] == {"timeout": {"count": 1, "first": "no end"}}
    assert found["ttft_ms"] == {"mean": pytest.approx(550), "p50": pytest.approx(550)}
    assert found["tpot_ms"]["p50"] == pytest.approx(100)
    assert found["itl_ms"]["mean"] == pytest.approx(150)
    assert found["goodput"]["requests_per_s"] == 0.5 and found["goodput"]["share"] == pytest.approx(1 / 3)
    assert percentiles([4, 1, 2, 3], [50, 90]) == {"mean": 2.5, "p50": 2.5, "p90": pytest.approx(3.7)}
    assert percentiles([], [50]) == {"mean": None, "p50": None}


# --- a real service ----------------------------------------------------------------------------------


def test_on_a_service(cluster: Cluster, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = cluster.settings(checkpoint, served_model_name="bench")
    out = tmp_path / "bench.json"

    def run(*flags: str) -> dict[str, Any]:
        target = ["--base-url", url, "--max-token-id", "400", "--metrics-url", cluster.metrics_url]
        sizes = ["--input-len", "12", "--output-len", "7", "--num-prompts", "5", "--num-warmups", "0"]
        assert cli.main(["bench", "serve", *target, *sizes, *flags, "--out", str(out)]) == 0
        document: dict[str, Any] = json.loads(out.read_text())
        assert (document["model"], document["completed"], document["failed"]) == ("bench", 5, 0)
        assert document["output_tokens"] == 5 * 7
        assert document["output_tokens_per_s"] * document["wall_s"] == pytest.approx(5 * 7)
        assert set(document["cpu_s_per_1k_tokens"]) >= {"ingress", "engine"}
        assert 0 < document["ttft_ms"]["p50"] <= document["e2e_ms"]["p50"] <= document["wall_s"] * 1e3
        return document

    with cluster.service(settings) as url:
        few = ["--input-len", "4", "--output-len", "1", "--num-prompts", "1", "--max-token-id", "400"]
        wait_until(
            lambda: cli.main(["bench", "serve", "--base-url", url, *few, "--out", str(out)]) == 0,
            timeout_s=60,
            what="a measured run",
        )
        closed = run("--max-concurrency", "2", "--goodput", "ttft:60000", "e2el:0.001", "--save-detailed")
        assert closed["peak_concurrency"] == 2 and closed["load"]["loop"] == "closed"
        assert closed["goodput"]["share"] == 0 and closed["late_ms"] is None
        assert closed["prompt_tokens"] == 5 * 12 and [d["output_tokens"] for d in closed["details"]] == [7] * 5
        open_loop = run("--request-rate", "40", "--burstiness", "inf", "--goodput", "ttft:60000")
        assert open_loop["goodput"]["share"] == 1 and open_loop["wall_s"] >= 4 / 40
        assert open_loop["late_ms"]["p50"] < 1000
        shared = run("--dataset-name", "prefix", "--prefix-len", "256", "--num-prefixes", "1", "--max-concurrency", "1")
        assert shared["cached_tokens"] == 4 * 256
        assert cli.main(["bench", "serve", "--base-url", f"{url}/v1", "--model", "other"]) == 2
        assert "--model other" in capsys.readouterr().err
        refused = [
            "--max-token-id",
            "400",
            "--num-warmups",
            "0",
            "--extra-body",
            '{"temperature": -1}',
            "--out",
            str(out),
        ]
        assert cli.main(["bench", "serve", "--base-url", url, "--num-prompts", "3", *refused]) == 1
    errors = json.loads(out.read_text())["errors"]
    assert errors["HTTP 400"]["count"] == 3 and "temperature" in errors["HTTP 400"]["first"]


# --- servers that misbehave --------------------------------------------------------------------------


class Server:
    """Answers each POST with the next of `answers`, in pieces as given; keeps the heads of all requests."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        self.heads: list[str] = []
        self._answers = iter(answers)
        self._listener = socket.create_server((LOOPBACK, 0))
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5.0)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as file:
                head = b"".join(iter(file.readline, b"\r\n")).decode()
                self.heads.append(head)
                if head.startswith("GET"):
                    body = b'm3_process_cpu_seconds_total{process="engine"} 1.5\n'
                    if "/v1/models" in head:
                        body = b'{"data": [{"id": "other"}]}'
                    size = f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                    connection.sendall(b"HTTP/1.1 200 OK\r\n" + size + body)
                    continue
                length = next(line for line in head.lower().splitlines() if line.startswith("content-length:"))
                file.read(int(length.partition(":")[2]))
                for piece in next(self._answers):
                    connection.sendall(piece)


@contextmanager
def serving(*answers: list[bytes]) -> Iterator[Server]:
    server = Server(list(answers))
    yield server
    server.close()


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n"


def test_errors_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    redirect = b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    plain = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
    good = STREAM + EVENT * 3 + LAST
    answers = [
        [STREAM, EVENT, ERROR],
        [STREAM, EVENT],
        [STREAM, b"data: {not JSON\n\n"],
        [STREAM, b"data: [DONE]\n\n"],
        [redirect],
        [plain],
        [],
        [good[i : i + 1] for i in range(len(good))],
    ]
    with serving(*answers) as server:
        flags = ["--num-prompts", str(len(answers)), "--num-warmups", "0", "--max-concurrency", "1"]
        key = ["--api-key", KEY, "--metrics-url", f"{server.url}/metrics", "--input-len", "3"]
        assert cli.main(["bench", "serve", "--base-url", server.url, *flags, *key, "--out", str(out)]) == 1
    document = json.loads(out.read_text())
    assert {kind: entry["count"] for kind, entry in document["errors"].items()} == dict.fromkeys(
        ("stream: engine_unavailable", "cut off", "no event", "no text", "HTTP 302", "no stream", "connection lost"), 1
    )
    assert (document["completed"], document["prompt_tokens"], document["output_tokens"]) == (1, 3, 5)
    with_key = {head.split()[1] for head in server.heads if KEY in head}
    without = {head.split()[1] for head in server.heads if KEY not in head}
    assert (with_key, without) == ({"/v1/models", "/v1/completions"}, {"/metrics"})
    assert "1 failed, cut off: the stream ended without [DONE], after 1 pieces" in capsys.readouterr().err


def test_chat_bodies(tmp_path: Path) -> None:
    """A role alone is no text; reasoning is. Without usage the pieces are counted, and it says so."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "a"}]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    stream = STREAM + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    out = tmp_path / "bench.json"
    flags = ["--endpoint", "/v1/chat/completions", "--num-prompts", "1", "--num-warmups", "0", "--no-ignore-eos"]
    with serving([stream]) as server:
        assert cli.main(["bench", "serve", "--base-url", server.url, *flags, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["output_tokens"] == 2 and document["output_tokens_are_pieces"]


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://{LOOPBACK}:{free_port()}"
    assert cli.main(["bench", "serve", "--base-url", url]) == 1
    assert f"error: {url} cannot be measured" in capsys.readouterr().err


def test_ctrl_c_reports_what_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with serving([STREAM + EVENT + LAST]) as server:
        command = [sys.executable, "-m", "service.cli", "bench", "serve", "--base-url", server.url, "--out", str(out)]
        # The second request is due in 1000 s.
        flags = ["--num-prompts", "2", "--num-warmups", "0", "--request-rate", "0.001", "--burstiness", "inf"]
        process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE)
        wait_until(lambda: any(head.startswith("POST") for head in server.heads), timeout_s=60, what="a request")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    document = json.loads(out.read_text())
    assert document["interrupted"] and document["requests"] == 2 and document["completed"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--goodput", "itl:5"], "must be NAME:MS with a name of ttft, tpot, e2el"),
        (["--request-rate", "0"], "must be a number above 0, got '0'"),
        (["--range-ratio", "1"], "must be in [0, 1), got '1'"),
        (["--mix", "1:2"], "must be INPUT:OUTPUT:WEIGHT"),
        (["--metric-percentiles", "50,100"], "must be percentiles in (0, 100)"),
        (["--endpoint", "/v1/embeddings"], "must end in /completions or /chat/completions"),
        (["--extra-body", "[]"], "must be a JSON object"),
        (["--dataset-name", "sharegpt"], "--dataset-name sharegpt needs --dataset-path FILE"),
        (["--ca-cert", "/nowhere"], "--ca-cert /nowhere cannot be read"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["bench", "serve", *flags])
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else -1
    assert status == 2
    assert message in capsys.readouterr().err
