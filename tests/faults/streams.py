"""Clients that stream completions and remember every token, to compare with an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

STREAM_TIMEOUT_S = 150.0
# Its embedding is NaN in the checkpoint of these tests.
POISON_TOKEN_ID = 500
# A text of it ends within no number of tokens that is asked for here.
ENDLESS = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 5000}


@dataclass(slots=True)
class Record:
    """What one stream got.

    usage: of its last chunk.  error: the error object in the stream, or of the answer.  cut: the connection broke.
    pause_s: the longest wait between two pieces.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    status: int = 0
    num_done: int = 0
    cut: bool = False
    pause_s: float = 0.0


Strike = Callable[[Sequence[Record]], Awaitable[None]]


def bodies(model: str, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests of all sorts: greedy and sampled, short and long, alone and with a common prefix, free and guided.

    Every fifth prompt is longer than what the sparse layers select. None can sample POISON_TOKEN_ID.
    """
    common = [(i * 37) % 450 + 10 for i in range(128)]
    out: list[dict[str, Any]] = []
    for i in range(count):
        own = [((i + 1) * 7919 + j * 31) % 450 + 10 for j in range(620 if i % 5 == 4 else 3 + i)]
        sampled = {"temperature": 0.0} if i % 2 else {"temperature": 1.0, "top_p": 0.95, "seed": 1000 + i}
        more = {"presence_penalty": 0.5, "repetition_penalty": 1.1} if i % 4 == 2 else {}
        prompt = common + own if i % 3 == 1 else own
        fixed = {"max_tokens": max_tokens, "ignore_eos": True, "logit_bias": {str(POISON_TOKEN_ID): -100}}
        if i % 6 == 3:
            more |= {"ignore_eos": False, "guided_json": ENDLESS}
        out.append({"model": model, "prompt": prompt} | fixed | sampled | more)
    return out


async def run_streams(
    url: str, requests: Sequence[dict[str, Any]], *, after_tokens: int = 0, strike: Strike | None = None
) -> list[Record]:
    """Stream all requests at once; `strike` runs when each has `after_tokens` tokens, or has ended."""
    records = [Record() for _ in requests]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=STREAM_TIMEOUT_S, limits=limits, trust_env=False) as client:
        work = [
            asyncio.create_task(stream(client, body, record)) for body, record in zip(requests, records, strict=True)
        ]
        try:
            async with asyncio.timeout(STREAM_TIMEOUT_S):
                if strike is not None:
                    while not all(
                        len(r.token_ids) >= after_tokens or t.done() for r, t in zip(records, work, strict=True)
                    ):
                        await asyncio.sleep(0.005)
                    await strike(records)
                await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()
    return records


async def ask_until(done: asyncio.Future[Any], url: str, model: str) -> list[str]:
    """What came of short requests, sent one after the other until `done`: "whole", or the answer that was not 200."""
    greedy = {"temperature": 0.0, "logit_bias": {str(POISON_TOKEN_ID): -100}}
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True} | greedy
    answered = []
    async with httpx.AsyncClient(base_url=url, timeout=STREAM_TIMEOUT_S, trust_env=False) as client:
        while not done.done():
            answer = await client.post("/v1/completions", json=body)
            answered.append("whole" if answer.status_code == 200 else answer.text)
    return answered


async def stream(client: httpx.AsyncClient, body: dict[str, Any], record: Record) -> None:
    """One streamed completion, read to its end."""
    more = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    heard_s = time.monotonic()
    try:
        async with client.stream("POST", "/v1/completions", json=body | more) as reply:
            record.status = reply.status_code
            if reply.status_code != 200:
                record.error = json.loads(await reply.aread())["error"]
                return
            async for line in reply.aiter_lines():
                if not line:
                    continue
                now_s = time.monotonic()
                record.pause_s = max(record.pause_s, now_s - heard_s)
                heard_s = now_s
                take(record, line)
    except httpx.TransportError:
        record.cut = True


def take(record: Record, line: str) -> None:
    """One line of the stream."""
    if line == "data: [DONE]":
        record.num_done += 1
        return
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        record.error = chunk["error"]
        return
    record.usage = chunk["usage"] or record.usage
    for choice in chunk["choices"]:
        record.token_ids += choice.get("token_ids") or []
        if choice["finish_reason"] is not None:
            record.finish_reasons.append(choice["finish_reason"])
