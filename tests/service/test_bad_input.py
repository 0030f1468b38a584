"""Bad input over real HTTP: each gets a clear error, and the service loses nothing that is in flight."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import Cluster, wait_until
from tests.faults.open_loop import mixture, offer

MODEL = "tiny"
PROMPT = "import os\n"
TIMEOUT_S = 60.0
MAX_BODY_BYTES = 3 * 2**20
MAX_NUM_SEQS = 4
MAX_QUEUED = 8
# Long enough to still run while all bad bodies are sent.
LONG = {"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True, "seed": 5, "model": MODEL}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def url(cluster: Cluster, checkpoint: Path) -> Iterator[str]:
    settings = cluster.settings(
        checkpoint,
        served_model_name=MODEL,
        max_num_seqs=MAX_NUM_SEQS,
        max_queued_requests=MAX_QUEUED,
        max_body_bytes=MAX_BODY_BYTES,
        max_prompts=64,
        max_model_len=2048,
    )
    with cluster.service(settings) as base:
        wait_until(lambda: httpx.get(f"{base}/ready").status_code == 200, timeout_s=30, what="readiness")
        yield base


class LongStream:
    """A stream that runs in a thread while a test does something else."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self.done = False
        self.first_token = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url,), daemon=True)
        self._thread.start()

    def _read(self, url: str) -> None:
        body = {**LONG, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line:
                    self.text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    self.first_token.set()

    def join(self) -> None:
        self._thread.join(timeout=TIMEOUT_S)


@pytest.fixture(scope="module", autouse=True)
def in_flight(url: str) -> Iterator[None]:
    """A stream is open while this module's requests are refused; it must end as if it had been alone."""
    answer = httpx.post(f"{url}/v1/completions", json=LONG, timeout=TIMEOUT_S)
    alone = answer.json()["choices"][0]["text"]
    stream = LongStream(url)
    assert stream.first_token.wait(TIMEOUT_S)
    yield
    stream.join()
    assert stream.done and stream.text == alone


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 1500, "an answer must not grow with the request"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["code"]
    return error


def post(url: str, body: bytes | dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}{path}", content=raw, headers=JSON, timeout=TIMEOUT_S)


_BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("prompt", "", "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [[]], "prompt"),
    ("prompt", None, "prompt"),
    ("prompt", 5, "prompt"),
    ("prompt", [1, "a"], "prompt"),
    ("prompt", [512], "prompt"),
    ("prompt", [-1], "prompt"),
    ("prompt", [10**30], "prompt"),
    ("prompt", [[1, 2], [3, 99999]], "prompt"),
    ("max_tokens", "3", "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 10**18, "max_tokens"),
    ("temperature", float("nan"), "temperature"),
    ("temperature", -0.5, "temperature"),
    ("top_p", float("inf"), "top_p"),
    ("top_k", 1.5, "top_k"),
    ("min_p", 7, "min_p"),
    ("n", 0, "n"),
    ("n", 65, "n"),
    ("seed", 2**64, "seed"),
    ("stop", "x" * 2**20, "stop"),
    ("stop", ["x" * 1024] * 1024, "stop"),
    ("stop_token_ids", [512], "stop_token_ids"),
    ("logit_bias", {"512": 1}, "logit_bias"),
    ("logit_bias", {"5": 1000}, "logit_bias"),
    ("logprobs", 21, "logprobs"),
    ("echo", "yes", "echo"),
    ("stream", 1, "stream"),
    ("suffix", "end", "suffix"),
    ("best_of", 3, "best_of"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("temprature", 1.0, "temprature"),
]


@pytest.mark.parametrize(
    ("field", "value", "param", "stream"),
    [
        (*bad, stream)
        for bad in _BAD_FIELDS
        for stream in (False, True)
        if not (stream and bad[0] in ("stream", "stream_options"))
    ],
)
def test_refusals_name_the_field(url: str, field: str, value: Any, param: str, stream: bool) -> None:
    error = refused(post(url, {"prompt": PROMPT, "stream": stream, field: value}))
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"prompt": "a"', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "\xff\xfe"}', "invalid_utf8"),
        (b'{"prompt": "\\udc00"}', "invalid_json"),
        (b"\x00" * 1000, "invalid_json"),
        (b"[]", "invalid_type"),
        (b"{}", "missing_required_parameter"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_broken_bodies(url: str, body: bytes, code: str, path: str) -> None:
    assert refused(post(url, body, path))["code"] == code


def test_prompts_longer_than_the_context(url: str) -> None:
    for prompt in ([5] * 2048, "x = 1\n" * 3000):
        error = refused(post(url, {"prompt": prompt, "max_tokens": 1}))
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert "2048" in error["message"]
    error = refused(post(url, {"prompt": [5] * 2040, "max_tokens": 9}))
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert post(url, {"prompt": [5] * 2040, "max_tokens": 1}).status_code == 200


def test_what_is_long_is_refused_before_it_costs_anything(url: str) -> None:
    error = refused(post(url, {"prompt": [5] * 500_000, "echo": True, "max_tokens": 0}))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = refused(post(url, {"tokens": [5] * 2049}, "/detokenize"))
    assert error["param"] == "tokens" and "2049" in error["message"] and "2048" in error["message"]
    assert post(url, {"tokens": [5] * 2048}, "/detokenize").status_code == 200
    error = refused(post(url, {"prompt": [[5] * 2000] * 16, "n": 2, "echo": True, "logprobs": 20, "max_tokens": 1}))
    assert error["param"] == "logprobs" and "1048576" in error["message"]
    error = refused(post(url, {"prompt": ["a"] * 5000}))
    assert error["param"] == "prompt" and "5000" in error["message"]


def test_routes_do_not_redirect(url: str) -> None:
    """The target would be made from the Host header."""
    answered = httpx.post(f"{url}/v1/completions/", json={"prompt": "a"}, headers={"host": "evil.example.com"})
    assert refused(answered, 404)["code"] == "unknown_route" and "location" not in answered.headers


def test_one_bad_prompt_refuses_the_whole_request(url: str) -> None:
    error = refused(post(url, {"prompt": [[1, 2, 3], [5] * 3000], "max_tokens": 4}))
    assert error["code"] == "context_length_exceeded"


def test_bodies_over_the_limit(url: str) -> None:
    body = json.dumps({"prompt": "x" * MAX_BODY_BYTES}).encode()
    assert refused(post(url, body), 413)["code"] == "request_too_large"

    def unsized() -> Iterator[bytes]:
        for begin in range(0, len(body), 2**18):
            yield body[begin : begin + 2**18]

    response = httpx.post(f"{url}/v1/completions", content=unsized(), headers=JSON, timeout=TIMEOUT_S)
    assert refused(response, 413)["code"] == "request_too_large"


def test_content_types(url: str) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        response = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
        assert refused(response)["code"] == "unsupported_media_type"
    accepted = httpx.post(
        f"{url}/v1/completions",
        content=body,
        headers={"content-type": "application/json; charset=utf-8"},
        timeout=TIMEOUT_S,
    )
    assert accepted.status_code == 200


def test_unknown_models_routes_and_methods(url: str) -> None:
    error = refused(post(url, {"prompt": PROMPT, "model": "other"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert refused(httpx.get(f"{url}/v1/models/other"), 404)["code"] == "model_not_found"
    assert refused(httpx.get(f"{url}/v1/nothing"), 404)["code"] == "unknown_route"
    wrong_method = httpx.get(f"{url}/v1/completions")
    assert refused(wrong_method, 405)["code"] == "method_not_allowed"
    assert wrong_method.headers["allow"] == "POST"


def test_tokenize_and_detokenize_refuse_too(url: str) -> None:
    assert refused(post(url, {"tokens": [512]}, "/detokenize"))["param"] == "tokens"
    assert refused(post(url, {"tokens": [-1]}, "/detokenize"))["param"] == "tokens"
    assert refused(post(url, {"tokens": "a"}, "/detokenize"))["param"] == "tokens"
    assert refused(post(url, {"prompt": ["a"]}, "/tokenize"))["param"] == "prompt"
    assert refused(post(url, {"prompt": "a", "messages": []}, "/tokenize"))["param"] == "messages"


def test_request_ids_must_be_short(url: str) -> None:
    response = httpx.get(f"{url}/health", headers={"x-request-id": "x" * 129})
    assert refused(response)["param"] == "x-request-id"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_answers_429_with_retry_after(url: str, stream: bool) -> None:
    body = {"prompt": [[5, 6, 7]] * (MAX_NUM_SEQS + MAX_QUEUED + 1), "max_tokens": 200, "stream": stream}
    response = post(url, body)
    assert refused(response, 429)["code"] == "engine_overloaded"
    assert int(response.headers["retry-after"]) >= 1


def test_a_burst_is_taken_as_far_as_the_queue_goes(cluster: Cluster, url: str) -> None:
    """Whoever is taken gets everything, the others are told when to come back, and nothing stays behind."""
    requests = mixture(MODEL, vocab_size=500, max_tokens=16, long_tokens=600, seed=0)
    outcomes = asyncio.run(offer(url, requests, rate=1000.0, seconds=0.06))
    accepted = [outcome for outcome in outcomes if outcome.status == 200]
    turned_away = [outcome for outcome in outcomes if outcome.status == 429]
    assert len(accepted) + len(turned_away) == len(outcomes) > 2 * (MAX_NUM_SEQS + MAX_QUEUED)
    assert len(accepted) >= MAX_NUM_SEQS + MAX_QUEUED - 1 and turned_away
    assert all(outcome.is_whole and outcome.num_tokens == 16 for outcome in accepted)
    assert all(outcome.retry_after is not None and int(outcome.retry_after) >= 1 for outcome in turned_away)
    # The stream of this module may still run.
    open_ = f'm3_engine_open_requests{{engine="0",model_name="{MODEL}"}} '
    wait_until(lambda: _series(cluster, open_) <= 1, timeout_s=30, what="the end of the burst")


def _series(cluster: Cluster, start: str) -> float:
    lines = httpx.get(cluster.metrics_url).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def test_refusals_are_counted_and_the_service_answers(cluster: Cluster, url: str) -> None:
    refused(post(url, {"prompt": PROMPT, "n": 0}))
    lines = [
        line
        for line in httpx.get(cluster.metrics_url).text.splitlines()
        if line.startswith('m3_refusals_total{code="invalid_value"')
    ]
    assert lines and float(lines[0].rpartition(" ")[2]) >= 1
    assert post(url, {"prompt": PROMPT, "max_tokens": 2}).status_code == 200
    assert httpx.get(f"{url}/ready").status_code == 200
