"""Who may use the service, and for how long: API keys, CORS, deadlines, and what must not be told."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.datastructures import Headers

from engine.errors import ConfigError, RequestError
from service.auth import CHECK_PERIOD_S, ApiKeys
from service.errors import Unauthorized, answer
from service.limits import (
    MAX_PROMPT_LOGPROBS,
    MAX_REQUEST_TOKENS,
    check_prompt_logprobs,
    check_request_tokens,
    read_timeout,
)
from service.settings import ServiceSettings
from tests.cluster import Cluster, wait_until

MODEL = "tiny"
TIMEOUT_S = 60.0
FILE_KEY, LISTED_KEY, NEXT_KEY = (f"{name}-{secrets.token_hex(16)}" for name in ("file", "listed", "next"))
PAGE = "https://app.example.com"
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "keys"
    path.write_text(f"# one a line\n\n{FILE_KEY}\n")
    return path


@pytest.fixture(scope="module")
def url(cluster: Cluster, checkpoint: Path, key_file: Path) -> Iterator[str]:
    settings = cluster.settings(
        checkpoint,
        served_model_name=MODEL,
        max_num_seqs=8,
        api_key_file=str(key_file),
        api_keys=LISTED_KEY,
        cors_allow_origins=[PAGE],
        request_timeout_s=LIMIT_S,
    )
    with cluster.service(settings) as base:
        wait_until(lambda: httpx.get(f"{base}/ready").status_code == 200, timeout_s=30, what="readiness")
        yield base


def client(url: str, key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=TIMEOUT_S, max_retries=0, **options)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [FILE_KEY, LISTED_KEY])
def test_each_key_is_taken(url: str, key: str) -> None:
    with client(url, key) as made:
        assert made.completions.create(model=MODEL, prompt="a", max_tokens=2).choices[0].text is not None
        assert list(made.completions.create(model=MODEL, prompt="a", max_tokens=2, stream=True))
        assert made.models.list().data[0].id == MODEL


@pytest.mark.parametrize("key", ["x" * 40, FILE_KEY[:-1], f"{FILE_KEY}0", FILE_KEY.upper(), "none"])
def test_other_keys_are_the_clients_authentication_error(url: str, key: str) -> None:
    with client(url, key) as made:
        for call in (made.models.list, lambda: made.completions.create(model=MODEL, prompt="a", stream=True)):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.code == "invalid_api_key" and caught.value.type == "invalid_request_error"
            assert caught.value.response.headers["www-authenticate"] == "Bearer"
            assert key not in caught.value.response.text or key == "none"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", FILE_KEY)],
        [("authorization", f"Basic {FILE_KEY}")],
        [("authorization", "Bearer")],
        [("authorization", f"Bearer {FILE_KEY} {FILE_KEY}")],
        [("authorization", f"Bearer {FILE_KEY}"), ("authorization", f"Bearer {FILE_KEY}")],
        [("x-api-key", FILE_KEY)],
        [("cookie", f"authorization=Bearer {FILE_KEY}")],
    ],
)
def test_what_is_no_bearer_key_is_refused(url: str, headers: list[tuple[str, str]]) -> None:
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{url}/v1/models?api_key={FILE_KEY}", headers=headers).status_code == 401


def test_nothing_but_the_probes_answers_without_a_key(url: str) -> None:
    for path in ("/health", "/ready"):
        assert httpx.get(f"{url}{path}").status_code == 200
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nothing"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/health%2f..%2fv1/models"),
        ("OPTIONS", "/v1/models"),
        ("DELETE", "/v1/models/tiny"),
    ):
        assert httpx.request(method, f"{url}{path}").status_code == 401, (method, path)


def test_there_are_no_documents_unless_asked_for(url: str) -> None:
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert httpx.get(f"{url}{path}", headers=bearer(FILE_KEY)).status_code == 404


def test_a_key_is_rotated_without_a_restart(url: str, key_file: Path) -> None:
    def status(key: str) -> int:
        return httpx.get(f"{url}/v1/models", headers=bearer(key)).status_code

    content = key_file.read_text()
    try:
        key_file.write_text(f"{content}{NEXT_KEY}\n")
        wait_until(lambda: status(NEXT_KEY) == 200, timeout_s=CHECK_PERIOD_S + 5, what="the new key")
        assert status(FILE_KEY) == 200, "both are valid while clients change over"
        replace(key_file, f"{NEXT_KEY}\n")
        wait_until(lambda: status(FILE_KEY) == 401, timeout_s=CHECK_PERIOD_S + 5, what="the end of the old key")
        assert status(NEXT_KEY) == 200 and status(LISTED_KEY) == 200
    finally:
        replace(key_file, content)
    wait_until(lambda: status(FILE_KEY) == 200, timeout_s=CHECK_PERIOD_S + 5, what="the old content")


def replace(path: Path, content: str) -> None:
    """As Kubernetes does it: another file is moved to the place."""
    other = path.with_name("next")
    other.write_text(content)
    os.replace(other, path)


def test_keys_stand_in_no_log_and_no_series(cluster: Cluster, url: str) -> None:
    for key in (FILE_KEY, LISTED_KEY, f"{FILE_KEY}-wrong"):
        httpx.post(f"{url}/v1/completions", headers=bearer(key), json={"prompt": "a", "temperature": key})
        httpx.get(f"{url}/v1/models", headers={"authorization": key})
    said = [path for path in (cluster.directory / "ray").rglob("*") if path.is_file() and path.suffix in LOG_SUFFIXES]
    assert any("Ingress" in path.name for path in said), "the ingress has a log"
    texts = {str(path): path.read_bytes() for path in said}
    texts["series"] = httpx.get(cluster.metrics_url).content
    texts["Ray's series"] = httpx.get(f"http://{cluster.ray_metrics}/metrics").content
    for key in (FILE_KEY, LISTED_KEY):
        assert [name for name, text in texts.items() if key.encode() in text] == []
    settings = cluster.settings(Path("m"), api_keys=LISTED_KEY)
    assert LISTED_KEY not in repr(settings) + str(settings) + settings.model_dump_json()


LOG_SUFFIXES = {".log", ".out", ".err"}


# --- browsers ----------------------------------------------------------------------------------------------------


def test_pages_of_a_listed_origin_may_use_the_api(url: str) -> None:
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    preflight = httpx.options(f"{url}/v1/completions", headers=asked)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in preflight.headers
    for key, status in ((FILE_KEY, 200), ("x" * 20, 401)):
        answered = httpx.get(f"{url}/v1/models", headers={"origin": PAGE, **bearer(key)})
        assert answered.status_code == status and answered.headers["access-control-allow-origin"] == PAGE
    stranger = {**asked, "origin": "https://evil.example.com"}
    assert "access-control-allow-origin" not in httpx.options(f"{url}/v1/completions", headers=stranger).headers
    assert "access-control-allow-origin" not in httpx.get(f"{url}/health", headers=stranger).headers


# --- deadlines ---------------------------------------------------------------------------------------------------

DEADLINE = {"x-request-timeout-seconds": "5"}
LONG = {"model": MODEL, "prompt": "a", "max_tokens": 4000}


def series(cluster: Cluster, prefix: str, *, having: str = "") -> float:
    """The sum of the series that begin with `prefix` and have that label, of this module's model."""
    lines = httpx.get(cluster.metrics_url).text.splitlines()
    ours = [line for line in lines if line.startswith(prefix) and f'="{MODEL}"' in line and having in line]
    assert ours or prefix == ABORTS, prefix
    return sum(float(line.rpartition(" ")[2]) for line in ours)


ABORTS = 'm3_request_success_total{finished_reason="abort"'


def wait_for_abort(cluster: Cluster, number: float) -> None:
    """Until the engine has ended that many requests, and holds no page of one."""
    wait_until(
        lambda: (
            series(cluster, ABORTS) == number
            and series(cluster, "m3_num_requests_running") == 0
            and series(cluster, "m3_kv_pages", having='state="held"') == 0
        ),
        timeout_s=10,
        what="the end of the requests in the engine",
    )


def test_a_deadline_is_a_timeout_error_or_an_error_event(cluster: Cluster, url: str) -> None:
    before = series(cluster, ABORTS)
    endless = {"ignore_eos": True}
    with client(url, FILE_KEY, default_headers=DEADLINE) as made, ThreadPoolExecutor(3) as pool:
        whole = pool.submit(made.completions.create, **LONG, extra_body=endless)
        streamed = pool.submit(lambda: list(made.completions.create(**LONG, extra_body=endless, stream=True)))
        body = {**LONG, **endless, "stream": True}
        headers = {**DEADLINE, **bearer(FILE_KEY)}
        raw = pool.submit(httpx.post, f"{url}/v1/completions", json=body, headers=headers, timeout=TIMEOUT_S)
    with pytest.raises(openai.APIStatusError) as caught:
        whole.result()
    assert caught.value.status_code == 408
    assert (caught.value.code, caught.value.type) == ("deadline_exceeded", "timeout_error")
    with pytest.raises(openai.APIError, match="longer than it may"):
        streamed.result()
    *chunks, error, done, rest = raw.result().text.split("\n\n")
    assert raw.result().status_code == 200 and (done, rest) == ("data: [DONE]", "") and chunks
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert all("choices" in json.loads(chunk.removeprefix("data: ")) for chunk in chunks)
    wait_for_abort(cluster, before + 3)


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "1e1", "30.1", "1_0", "", "5, 6", "٣"])
def test_deadlines_that_are_not_taken(url: str, value: str) -> None:
    headers = [(b"x-request-timeout-seconds", value.encode()), (b"authorization", f"Bearer {FILE_KEY}".encode())]
    error = httpx.get(f"{url}/v1/models", headers=headers)
    assert error.status_code == 400 and error.json()["error"]["param"] == "x-request-timeout-seconds"
    assert "[0.5, 30]" in error.json()["error"]["message"]


def test_a_request_cannot_ask_to_outlive_its_client(url: str) -> None:
    headers = {"x-request-disconnect-disabled": "?1", **bearer(FILE_KEY)}
    error = httpx.get(f"{url}/v1/models", headers=headers)
    assert error.status_code == 400 and error.json()["error"]["param"] == "x-request-disconnect-disabled"
    headers["x-request-disconnect-disabled"] = "?0"
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_the_service_answers_while_it_reads_a_large_bad_body(url: str) -> None:
    """An error for each of its entries would take minutes and gigabytes."""
    body = b'{"prompt":"a","stop":[' + b"1," * 7_000_000 + b"1]}"
    headers = {"content-type": "application/json", **bearer(FILE_KEY)}
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(httpx.post, f"{url}/v1/completions", content=body, headers=headers, timeout=TIMEOUT_S)
        while not answered.done():
            assert httpx.get(f"{url}/health", timeout=TIMEOUT_S).status_code == 200
    error = answered.result()
    assert error.status_code == 400 and error.json()["error"]["param"] == "stop" and len(error.content) < 1000


# --- without a service -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        ("too short\n", "line 1 is no key"),
        ("0123456789abcdef\nwith a space in it\n", "line 2 is no key"),
        ("x" * 513, "line 1 is no key"),
        ("schlüssel-0123456789\n", "line 1 is no key"),
        ("\n".join(f"{i:016}" for i in range(1001)), "1001 keys, at most 1000"),
        ("x" * (2**20 + 1), "larger than 1048576 bytes"),
    ],
)
def test_bad_key_files(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        ApiKeys(str(path), None)
    assert "api_key_file" in str(caught.value) and "too short" not in str(caught.value)


def test_other_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file .*cannot be read: No such file"):
        ApiKeys(str(tmp_path / "none"), None)
    with pytest.raises(ConfigError, match="M3SERVE_API_KEYS: entry 2 is no key"):
        ApiKeys(None, "0123456789abcdef,short")
    with pytest.raises(ConfigError, match="M3SERVE_API_KEYS holds no key"):
        ApiKeys(None, "")


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ApiKeys.of(ServiceSettings(model="m")) is None
    monkeypatch.setenv("M3SERVE_API_KEYS", f" {LISTED_KEY} ,{FILE_KEY}")
    keys = ApiKeys.of(ServiceSettings(model="m"))
    assert keys is not None and len(keys) == 2
    keys.check(Headers({"Authorization": f"bearer {LISTED_KEY}"}))


def test_a_file_that_breaks_leaves_the_keys_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text(FILE_KEY)
    keys = ApiKeys(str(path), None)
    monkeypatch.setattr("service.auth.CHECK_PERIOD_S", 0.0)
    headers = Headers(bearer(FILE_KEY))
    for break_it in (lambda: path.write_text("short"), path.unlink):
        caplog.clear()
        break_it()
        for _ in range(3):
            keys.check(headers)
        [record] = caplog.records
        assert record.levelno == logging.ERROR and "stay valid" in record.getMessage()
    path.write_text(NEXT_KEY)
    with pytest.raises(Unauthorized):
        keys.check(headers)
    keys.check(Headers(bearer(NEXT_KEY)))


@pytest.mark.parametrize(
    ("given", "limit_s", "expected"),
    [([], None, None), ([], 7.0, 7.0), (["2"], None, 1.6), (["0.5"], None, 0.4), (["100"], 100.0, 99.0)],
)
def test_the_time_of_a_request(given: list[str], limit_s: float | None, expected: float | None) -> None:
    headers = Headers(raw=[(b"x-request-timeout-seconds", value.encode()) for value in given])
    assert read_timeout(headers, limit_s) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("given", [["0.4"], ["0.499999999"], ["100.1"], ["5", "6"], ["1e1"], ["0x5"], ["9" * 50]])
def test_times_that_are_not_taken(given: list[str]) -> None:
    headers = Headers(raw=[(b"x-request-timeout-seconds", value.encode()) for value in given])
    with pytest.raises(RequestError, match=r"x-request-timeout-seconds must be a decimal number in \[0\.5, 100\]"):
        read_timeout(headers, 100.0)


def test_prompts_of_one_request_are_bounded_together() -> None:
    check_request_tokens(MAX_REQUEST_TOKENS, 1)
    for num_tokens, n, param in ((MAX_REQUEST_TOKENS + 1, 1, "prompt"), (MAX_REQUEST_TOKENS // 2 + 1, 2, "n")):
        with pytest.raises(RequestError) as caught:
            check_request_tokens(num_tokens, n)
        assert caught.value.param == param and answer(caught.value).status == 400


def test_log_probabilities_of_prompts_are_bounded() -> None:
    check_prompt_logprobs(10**9, 100, None, param="logprobs")
    check_prompt_logprobs(MAX_PROMPT_LOGPROBS // 6, 2, 2, param="logprobs")
    with pytest.raises(RequestError, match="prompt_logprobs=20 of prompts of 131071 tokens") as caught:
        check_prompt_logprobs(131071, 1, 20, param="prompt_logprobs")
    assert caught.value.param == "prompt_logprobs"


@pytest.mark.parametrize("origin", ["app.example.com", "https://a.example/", "https://a.example/x", "null", "https://"])
def test_origins_are_scheme_and_host(origin: str) -> None:
    with pytest.raises(ValueError, match="SCHEME://HOST"):
        ServiceSettings(model="m", cors_allow_origins=[origin])


def test_origins_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3SERVE_CORS_ALLOW_ORIGINS", "https://a.example, http://localhost:3000")
    assert ServiceSettings(model="m").cors_allow_origins == ["https://a.example", "http://localhost:3000"]
