"""Clients of a running service that count what they were answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

TEXT = "def add(a, b):\n    return a + b\n" * 8
TIMEOUT_S = 60.0
SHARED_TOKENS = 128
OWN_TOKENS = 1000


@dataclass(slots=True)
class Load:
    """What clients got since the start. All of it runs on one event loop.

    statuses: answers that began, by HTTP status.  finished: choices that ended, by reason; abort: the client left.
    refused: answers without a choice, by error code.  tokens: that arrived.  streams: answers that were streamed to
    their end.  choice_s: sum over choices of the time from the request's departure to the end of its answer.
    """

    url: str
    model: str
    statuses: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    streams: int = 0
    choice_s: float = 0.0
    num_started: int = 0

    def client(self) -> httpx.AsyncClient:
        """Connections without end, as many clients have; proxies of the environment are not for loopback."""
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=limits, trust_env=False)

    def forget(self) -> None:
        """Count from 0 again."""
        for counter in (self.statuses, self.finished, self.refused):
            counter.clear()
        self.tokens = self.streams = 0
        self.choice_s = 0.0

    async def post(self, client: httpx.AsyncClient, **fields: Any) -> int:
        """One request that is answered whole; its status."""
        started_s = time.monotonic()
        reply = await client.post("/v1/completions", json=self._body(**fields))
        self.statuses[str(reply.status_code)] += 1
        answer = reply.json()
        if reply.status_code == 200:
            self.tokens += answer["usage"]["completion_tokens"]
            self.finished.update(choice["finish_reason"] for choice in answer["choices"])
            self.choice_s += len(answer["choices"]) * (time.monotonic() - started_s)
        else:
            self.refused[answer["error"]["code"]] += 1
        return reply.status_code

    async def stream(self, client: httpx.AsyncClient, *, leave_after: int | None = None, **fields: Any) -> None:
        """One streamed request of one choice, read to its end, or left after so many tokens."""
        started_s = time.monotonic()
        body = self._body(stream=True, return_token_ids=True, **fields)
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            self.statuses[str(reply.status_code)] += 1
            if reply.status_code != 200:
                self.refused[json.loads(await reply.aread())["error"]["code"]] += 1
                return
            await self._read(reply, leave_after)
            self.choice_s += time.monotonic() - started_s

    async def _read(self, reply: httpx.Response, leave_after: int | None) -> None:
        num_tokens = 0
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                self.streams += 1
                return
            if not line:
                continue
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            num_tokens += len(choice["token_ids"])
            self.tokens += len(choice["token_ids"])
            if choice["finish_reason"] is not None:
                self.finished[choice["finish_reason"]] += 1
            if leave_after is not None and num_tokens >= leave_after:
                self.finished["abort"] += 1
                return
        raise AssertionError(f"a stream ended without [DONE], after {num_tokens} tokens")

    async def keep_busy(self, client: httpx.AsyncClient, stop: asyncio.Event) -> None:
        """A closed loop of one client, streamed and whole in turn: the next request follows the last answer."""
        is_streamed = True
        while not stop.is_set():
            await (self.stream(client) if is_streamed else self.post(client))
            is_streamed = not is_streamed

    def _body(self, **fields: Any) -> dict[str, Any]:
        """A request with a long prompt of its own: only its first page can be in a prefix cache."""
        self.num_started += 1
        own = ((self.num_started * 7919 + i * 31) % 400 + 10 for i in range(OWN_TOKENS))
        prompt = [*range(10, 10 + SHARED_TOKENS), *own]
        return {"model": self.model, "prompt": prompt, "max_tokens": 24, "ignore_eos": True, "seed": 1} | fields
