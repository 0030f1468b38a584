"""Streams over HTTP while processes of a service of two engines are killed or stopped, and what must not spread."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from tests.cluster import LOOPBACK, Cluster
from tests.faults.blows import (
    ENGINE_FAULTS,
    Fault,
    halt_ingress,
    hit_ingress,
    kill_controller,
    kill_every_replica,
    kill_proxy,
)
from tests.faults.fleet import Fleet, open_fleet
from tests.faults.guarantees import (
    Undisturbed,
    assert_true,
    assert_unbroken,
    endure,
    enter,
)
from tests.faults.ledger import Ledger
from tests.faults.streams import POISON_TOKEN_ID, Record, run_streams

SERVICE = "2 engines x TP2, 2 ingresses"
IN_SHORT = ("rank 1 killed", "engine replica stopped")
full = pytest.mark.full


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, poisoned: Path) -> Iterator[Fleet]:
    with open_fleet(cluster, poisoned, replicas=2, ingress_replicas=2) as fleet:
        yield fleet
        assert fleet.series("m3_token_mismatches_total") == fleet.series("m3_page_check_failures_total") == 0


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet, ledger: Ledger) -> Undisturbed:
    return Undisturbed.run(fleet, max_tokens=ledger.max_tokens)


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in IN_SHORT else full) for f in ENGINE_FAULTS])
def test_streams_go_on_elsewhere(fleet: Fleet, undisturbed: Undisturbed, ledger: Ledger, fault: str) -> None:
    row = ledger.open(fault, SERVICE)
    for round_ in range(ledger.rounds):
        endure(fleet, undisturbed, row, ENGINE_FAULTS[fault], round_=round_)
    if not row.moved:  # by chance the engine had no streams
        endure(fleet, undisturbed, row, ENGINE_FAULTS[fault], round_=0)
    assert row.moved, row
    assert_unbroken(row)


@pytest.mark.parametrize(
    ("fault", "blow"),
    [
        ("ingress killed", hit_ingress(signal.SIGKILL)),
        pytest.param("ingress stopped until Serve replaces it", hit_ingress(signal.SIGSTOP), marks=full),
    ],
)
def test_a_lost_ingress_breaks_its_own_connections_only(
    fleet: Fleet, undisturbed: Undisturbed, ledger: Ledger, fault: str, blow: Fault
) -> None:
    row = ledger.open(fault, SERVICE)
    for round_ in range(ledger.rounds):
        endure(fleet, undisturbed, row, blow, round_=round_)
    for round_ in range(2):
        if not 0 < row.cut < row.streams:  # by chance one ingress had every stream
            endure(fleet, undisturbed, row, blow, round_=round_)
    assert 0 < row.cut < row.streams and row.whole == row.streams - row.cut, row
    assert row.refused == 0, row
    assert_true(row)


@full
@pytest.mark.parametrize(
    ("fault", "blow"), [("ingress stopped for 2 s", halt_ingress), ("Serve controller killed", kill_controller)]
)
def test_streams_do_not_break(fleet: Fleet, undisturbed: Undisturbed, ledger: Ledger, fault: str, blow: Fault) -> None:
    row = ledger.open(fault, SERVICE)
    for round_ in range(ledger.rounds):
        endure(fleet, undisturbed, row, blow, round_=round_)
    assert_unbroken(row)


@full
def test_a_lost_proxy_leaves_nothing_behind(fleet: Fleet, undisturbed: Undisturbed, ledger: Ledger) -> None:
    """All its connections break; the engines must hear of it."""
    row = ledger.open("Serve proxy killed", SERVICE)
    for round_ in range(ledger.rounds):
        endure(fleet, undisturbed, row, kill_proxy, round_=round_)
    assert row.cut == row.streams, row
    assert_true(row)


def test_logits_that_are_not_finite_end_their_request_alone(
    fleet: Fleet, undisturbed: Undisturbed, ledger: Ledger
) -> None:
    row = ledger.open("NaN logits in 4 requests", SERVICE)
    good = undisturbed.requests
    bad = [good[0] | {"prompt": prompt} for prompt in poisoned_prompts()]
    before = fleet.series("m3_requests_not_finite_total")
    records = asyncio.run(run_streams(fleet.url, [*bad, *good]))
    fleet.wait_until_idle()
    row.hits = len(bad)
    row.pages = fleet.held_pages()
    enter(row, records[len(bad) :], undisturbed.records)
    for record in records[: len(bad)]:
        assert record.error is not None and record.error["code"] == "generation_failed", record
        assert "not finite" in record.error["message"] and not record.token_ids
    assert fleet.series("m3_requests_not_finite_total") == before + len(bad)
    assert_unbroken(row)


def poisoned_prompts() -> list[list[int]]:
    """The bad token first, last, alone, and in the second page."""
    return [[POISON_TOKEN_ID, 7, 8], [7, 8, POISON_TOKEN_ID], [POISON_TOKEN_ID], [9] * 200 + [POISON_TOKEN_ID, 9]]


def test_a_client_that_does_not_read_slows_nobody(fleet: Fleet, undisturbed: Undisturbed, ledger: Ledger) -> None:
    row = ledger.open("4 clients that never read", SERVICE)
    good = undisturbed.requests
    slow = [good[i] | {"max_tokens": 120, "stream": True, "logprobs": 5} for i in range(4)]
    sockets = [send_and_forget(fleet.url, body) for body in slow]
    try:
        records = asyncio.run(run_streams(fleet.url, good))
        # While they still do not read: the engine has long gone on.
        fleet.wait_until_idle()
    finally:
        for each in sockets:
            each.close()
    row.hits = len(sockets)
    row.pages = fleet.held_pages()
    enter(row, records, undisturbed.records)
    assert_unbroken(row)


def send_and_forget(url: str, body: dict[str, Any]) -> socket.socket:
    """A connection with a small receive buffer, on which nothing is read after the request was sent."""
    content = msgspec.json.encode(body)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((LOOPBACK, int(url.rpartition(":")[2])))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {LOOPBACK}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@full
def test_the_openai_client_sees_one_unbroken_stream(fleet: Fleet, undisturbed: Undisturbed, ledger: Ledger) -> None:
    """Text and usage, through the client that most people use; greedy and sampled."""
    row = ledger.open("both engine replicas killed, openai client", SERVICE)
    requests = undisturbed.requests[:4]

    async def read(client: openai.AsyncOpenAI, body: dict[str, Any], record: Record) -> str:
        named = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logit_bias", "presence_penalty"}
        stream = await client.completions.create(
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True} | {k: v for k, v in body.items() if k not in named},
            **{k: v for k, v in body.items() if k in named},
        )
        text = ""
        async for chunk in stream:
            if chunk.usage is not None:
                record.usage = chunk.usage.model_dump()
            for choice in chunk.choices:
                text += choice.text
                record.token_ids += (choice.model_extra or {}).get("token_ids") or []
                if choice.finish_reason is not None:
                    record.finish_reasons.append(choice.finish_reason)
        record.num_done += 1
        return text

    async def run(*, kill: bool) -> tuple[list[str], list[Record]]:
        records = [Record() for _ in requests]
        blow = await asyncio.to_thread(kill_every_replica, fleet)
        async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0) as client:
            work = [asyncio.create_task(read(client, *pair)) for pair in zip(requests, records, strict=True)]
            async with asyncio.timeout(120):
                while kill and not all(len(record.token_ids) > 5 for record in records):
                    await asyncio.sleep(0.005)
                lost = await blow() if kill else set()
                texts: Sequence[str] = await asyncio.gather(*work)
        if kill:
            await asyncio.to_thread(fleet.wait_until_whole, without=lost)
        return list(texts), records

    expected_texts, expected = asyncio.run(run(kill=False))
    moved = fleet.num_moved()
    for _ in range(ledger.rounds):
        texts, records = asyncio.run(run(kill=True))
        assert texts == expected_texts
        enter(row, records, expected)
        row.hits += 1
    row.moved = fleet.num_moved() - moved
    assert row.moved >= row.streams, row
    fleet.wait_until_idle()
    assert_unbroken(row)
