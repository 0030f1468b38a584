"""The running service against its own OpenAPI document, and bytes that are no HTTP.

M3_FUZZ_REQUESTS: how many per route and kind, 25 unless set.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from service.ingress import app
from service.openapi import ROUTES, Route, openapi_document
from service.settings import ServiceSettings
from tests.cluster import LOOPBACK, Cluster, wait_until

MODEL = "tiny"
KEY = f"key-{secrets.token_hex(16)}"
NUM_REQUESTS = int(os.environ.get("M3_FUZZ_REQUESTS", "25"))
# The document itself, and what a person's browser asks for.
NOT_IN_THE_DOCUMENT = ("/openapi.json", "/", "/playground/layers")
# Short answers, whatever max_tokens and n a request has.
LIMITS: dict[str, Any] = {"max_model_len": 48, "max_prompts": 8, "request_timeout_s": 20.0}
DOCUMENT = openapi_document(ServiceSettings(model=MODEL, api_key_file="keys", **LIMITS))
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def url(cluster: Cluster, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    service = cluster.settings(
        checkpoint, served_model_name=MODEL, max_num_seqs=8, enable_docs=True, api_key_file=str(keys), **LIMITS
    )
    with cluster.service(service) as base:
        wait_until(lambda: httpx.get(f"{base}/ready").status_code == 200, timeout_s=30, what="readiness")
        yield base


def test_the_document_has_every_route() -> None:
    # Serve puts the routes of the class into a router of its own.
    below = [route for outer in app.routes for route in getattr(outer, "original_router", app).routes]
    routes = [route for route in below if isinstance(route, APIRoute)]
    handled = {(method.lower(), route.path.replace(":path}", "}")) for route in routes for method in route.methods}
    assert handled == {(route.method, route.path) for route in ROUTES} | {("get", path) for path in NOT_IN_THE_DOCUMENT}


def test_the_service_gives_this_document_with_a_key(url: str) -> None:
    assert httpx.get(f"{url}/openapi.json").status_code == 401
    given_document = httpx.get(f"{url}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    assert given_document == DOCUMENT


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_answers_are_those_of_the_document(url: str, route: Route, mode: GenerationMode) -> None:
    operation = SCHEMA[route.path][route.method.upper()]

    @settings(max_examples=NUM_REQUESTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # Ray Serve's proxy reads the deadline too, and on a busy machine its answer, which is text, may come first.
        headers = {"x-request-timeout-seconds": "20", "authorization": f"Bearer {KEY}"}
        case.call_and_validate(base_url=url, headers=headers, checks=CHECKS, timeout=60)
        if not route.public:
            headers["authorization"] = "Bearer other"
            assert case.call(base_url=url, headers=headers, timeout=60).status_code == 401

    check()


@settings(max_examples=4 * NUM_REQUESTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.sampled_from(
        [
            b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n",
            b"POST /tokenize HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET /health HTTP/1.1\r\n",
            b"",
        ]
    ),
    lines=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from(
                [
                    b"Content-Length: 5",
                    b"Content-Length: -1",
                    b"Transfer-Encoding: chunked",
                    b"Content-Type: application/json",
                    b"Expect: 100-continue",
                    b"Upgrade: websocket",
                    b"x-request-timeout-seconds: inf",
                    b"x-request-disconnect-disabled: ?1",
                    b"authorization: Bearer \xff",
                    b"5",
                    b"ffffffffffffffff",
                    b"",
                ]
            ),
        ),
        max_size=6,
    ),
)
def test_bytes_that_are_no_request_end_their_connection_alone(url: str, start: bytes, lines: list[bytes]) -> None:
    port = int(url.rpartition(":")[2])
    with socket.create_connection((LOOPBACK, port), timeout=10.0) as connection:
        connection.sendall(start + b"\r\n".join([*lines, b"", b""]))
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := _receive(connection):
            answer += piece
    assert b" 200 OK" not in answer or b"/health" in start
    assert httpx.get(f"{url}/health").status_code == 200


def _receive(connection: socket.socket) -> bytes:
    """The next bytes; none when the other side has closed, in whatever way."""
    try:
        return connection.recv(65536)
    except ConnectionError:
        return b""
