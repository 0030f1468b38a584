"""Clients that come whether or not the earlier ones are done, and what each of them sees."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

STREAM_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Outcome:
    """One request. Times are time.monotonic().

    sent_s: when it was due to leave, whenever it did.  answered_s: when the status came.  token_s: of each piece of its
    stream.  token_ids: all of them.  is_whole: it came to its finish_reason and [DONE].
    """

    sent_s: float
    wanted_tokens: int
    answered_s: float = 0.0
    status: int = 0
    retry_after: str | None = None
    token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    is_whole: bool = False
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def pauses_s(self) -> list[float]:
        """Between two pieces of the stream."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


def mixture(model: str, *, vocab_size: int, max_tokens: int, long_tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """Requests without end: short prompts, and one long one in ten. No two prompts share a page."""
    rng = random.Random(seed)
    while True:
        length = long_tokens if rng.random() < 0.1 else rng.randint(10, 100)
        prompt = [rng.randrange(10, vocab_size) for _ in range(length)]
        yield {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0}


async def offer(url: str, requests: Iterator[dict[str, Any]], *, rate: float, seconds: float) -> list[Outcome]:
    """An open loop: `rate` requests a second come at random, whatever became of the others; returns when all ended."""
    rng = random.Random(1)
    outcomes: list[Outcome] = []
    async with _client(url) as client, asyncio.TaskGroup() as group:
        start_s = due_s = time.monotonic()
        while due_s < start_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            body = next(requests)
            outcomes.append(Outcome(due_s, body["max_tokens"]))
            group.create_task(_stream(client, body, outcomes[-1]))
            due_s += rng.expovariate(rate)
    return outcomes


async def saturate(url: str, requests: Iterator[dict[str, Any]], *, clients: int, seconds: float) -> float:
    """A closed loop of so many clients: the requests a second that the service takes when it is just busy."""
    num_done = 0
    end_s = time.monotonic() + seconds

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal num_done
        while time.monotonic() < end_s:
            outcome = Outcome(time.monotonic(), 0)
            await _stream(client, next(requests), outcome)
            num_done += outcome.is_whole and time.monotonic() < end_s

    async with _client(url) as client, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(work(client))
    return num_done / seconds


async def ask_health(url: str) -> list[float]:
    """Seconds that GET /health takes, four times a second until it is cancelled: what HTTP alone takes."""
    waits_s: list[float] = []
    async with _client(url) as client:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                sent_s = time.monotonic()
                (await client.get("/health")).raise_for_status()
                waits_s.append(time.monotonic() - sent_s)
                await asyncio.sleep(0.25)
    return waits_s


def percentile(values: Sequence[float], share: float) -> float:
    """NaN for no values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=STREAM_TIMEOUT_S, limits=limits, trust_env=False)


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], outcome: Outcome) -> None:
    more = {"stream": True, "return_token_ids": True}
    try:
        async with client.stream("POST", "/v1/completions", json=body | more) as reply:
            outcome.answered_s, outcome.status = time.monotonic(), reply.status_code
            if reply.status_code != 200:
                outcome.retry_after = reply.headers.get("retry-after")
                outcome.error = (await reply.aread()).decode()
                return
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    outcome.is_whole = bool(outcome.finish_reasons)
                elif line:
                    _take(outcome, json.loads(line.removeprefix("data: ")))
    except httpx.TransportError as error:
        outcome.error = repr(error)


def _take(outcome: Outcome, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        outcome.error = chunk["error"]["message"]
        return
    for choice in chunk["choices"]:
        token_ids = choice.get("token_ids") or []
        if token_ids:
            outcome.token_s.append(time.monotonic())
            outcome.num_tokens += len(token_ids)
        if choice["finish_reason"] is not None:
            outcome.finish_reasons.append(choice["finish_reason"])
