"""`m3serve serve` is told to stop while it is busy: what it accepted comes to its end, what is new is told to wait."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import process_exists, wait_until
from tests.faults.guarantees import NUM_STREAMS
from tests.faults.streams import Record, run_streams
from tests.serve_command import Command

# Fewer than there are streams: the others wait in the queue when the signal comes.
MAX_NUM_SEQS = 8
END_TIMEOUT_S = 60.0
# From the second signal to the end of the process: Ray takes most of it.
CUT_TIMEOUT_S = 20.0


@pytest.fixture
def command(checkpoint: Path) -> Iterator[Command]:
    started = Command(
        *("--model", str(checkpoint), "--served-model-name", "mine", "--index-topk-freq", "2"),
        *("--dtype", "float32", "--num-threads", "1", "--max-num-seqs", str(MAX_NUM_SEQS)),
    )
    yield started
    started.end()


def body(max_tokens: int) -> dict[str, Any]:
    return {"model": "mine", "prompt": "def f(x):", "max_tokens": max_tokens, "ignore_eos": True}


async def knock(base: str, command: Command, seen: list[tuple[int, str]]) -> None:
    """Ask for a token again and again until the process ends. Every answer: status and Retry-After, 0: refused."""
    async with httpx.AsyncClient(timeout=END_TIMEOUT_S, trust_env=False) as client:
        while command.process.poll() is None:
            try:
                answer = await client.post(f"{base}/completions", json=body(1))
            except httpx.TransportError:
                seen.append((0, ""))
            else:
                seen.append((answer.status_code, answer.headers.get("retry-after", "")))
            await asyncio.sleep(0.05)


def test_sigterm_loses_no_stream_and_answers_new_requests(command: Command) -> None:
    base, said, metrics = command.wait_until_ready()
    assert said == "model=mine plan=DDFSF"
    pids = command.descendants()
    assert len(pids) > 5, "the command's own Ray is among its processes"
    seen: list[tuple[int, str]] = []

    async def run() -> list[Record]:
        knocking: list[asyncio.Task[None]] = []

        async def strike(_records: Sequence[Record]) -> None:
            # Those that wait in the queue have no tokens yet.
            accepted = f'm3_engine_open_requests{{engine="0",model_name="mine"}} {NUM_STREAMS}.0'
            while accepted not in (await asyncio.to_thread(httpx.get, metrics)).text:
                await asyncio.sleep(0.05)
            command.process.send_signal(signal.SIGTERM)
            knocking.append(asyncio.create_task(knock(base, command, seen)))

        requests = [body(40 + 5 * i) for i in range(NUM_STREAMS)]
        async with asyncio.timeout(2 * END_TIMEOUT_S):
            records = await run_streams(base.removesuffix("/v1"), requests, strike=strike)
            await asyncio.gather(*knocking)
        return records

    records = asyncio.run(run())
    for i, record in enumerate(records):
        assert (record.error, record.cut, record.num_done) == (None, False, 1), (i, record)
        assert len(record.token_ids) == 40 + 5 * i and record.finish_reasons == ["length"]
    statuses = [status for status, _ in seen]
    first_refused = next(i for i, status in enumerate(statuses) if status != 200)
    # A request may still be taken before the fronts hear of it; from then on none is.
    assert set(statuses[first_refused:]) <= {503, 0} and 503 in statuses, seen
    assert all(wait.isdecimal() and int(wait) >= 1 for status, wait in seen if status == 503)
    assert command.process.wait(timeout=END_TIMEOUT_S) == 0, command.errors
    wait_until(lambda: not any(map(process_exists, pids)), timeout_s=10, what="the end of every process")
    assert len(command.lines) == 1, "stdout carries the ready line alone"


@pytest.mark.full
def test_a_second_signal_ends_it_at_once(command: Command) -> None:
    base, _said, _metrics = command.wait_until_ready()

    async def strike(records: Sequence[Record]) -> None:
        command.process.send_signal(signal.SIGTERM)
        while not any("stopping" in line for line in command.errors):
            await asyncio.sleep(0.05)
        num_tokens = sum(len(record.token_ids) for record in records)
        while sum(len(record.token_ids) for record in records) <= num_tokens:
            await asyncio.sleep(0.05)
        command.process.send_signal(signal.SIGTERM)

    async def run() -> tuple[list[Record], float]:
        records = await run_streams(base.removesuffix("/v1"), [body(4000)] * 4, after_tokens=5, strike=strike)
        return records, time.monotonic()

    started_s = time.monotonic()
    records, _ = asyncio.run(run())
    assert command.process.wait(timeout=CUT_TIMEOUT_S) == 0, command.errors
    assert time.monotonic() - started_s < END_TIMEOUT_S
    assert all(record.cut and not record.num_done for record in records)
    assert any(line.startswith("m3serve: cut off: 4 requests had not finished") for line in command.errors)
