"""An OpenAI-compatible endpoint under a closed loop: a fixed number of streams, each starting when the last ended."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from engine.errors import ConfigError
from service.bench.report import machine, progress, summary, table, write

PROGRESS_PERIOD_S = 10.0


@dataclass(slots=True)
class _Stream:
    """What one request's client saw. times_s: of each chunk with text, from the start of the request."""

    times_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


async def _stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> _Stream:
    seen = _Stream()
    started = time.perf_counter()
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                seen.error = f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
                return seen
            async for event in _events(response):
                if "error" in event:
                    seen.error = str(event["error"])
                    return seen
                if event.get("choices"):
                    seen.times_s.append(time.perf_counter() - started)
                if event.get("usage"):
                    seen.prompt_tokens = event["usage"]["prompt_tokens"]
                    seen.output_tokens = event["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.end_s = time.perf_counter() - started
    return seen


async def _cpu_seconds(client: httpx.AsyncClient, metrics_url: str | None) -> dict[str, float]:
    """CPU time per kind of process, from the service's own exporter."""
    if metrics_url is None:
        return {}
    text = (await client.get(metrics_url)).text
    seconds: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("m3_process_cpu_seconds_total{"):
            labels, value = line.rsplit(" ", 1)
            kind = labels.split('process="', 1)[1].split('"', 1)[0]
            seconds[kind] = seconds.get(kind, 0.0) + float(value)
    return seconds


async def _bench(
    base_url: str,
    *,
    model: str | None,
    streams: int,
    requests: int,
    input_tokens: int,
    output_tokens: int,
    max_token_id: int,
    metrics_url: str | None,
    timeout_s: float,
    api_key: str | None,
) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=streams + 1)
    async with httpx.AsyncClient(timeout=timeout_s, limits=limits, headers=headers) as client:
        served = (await client.get(f"{base_url}/models")).raise_for_status().json()["data"]
        card = next((entry for entry in served if model in (None, entry["id"])), None)
        if card is None:
            names = ", ".join(entry["id"] for entry in served)
            raise ConfigError(f"--model {model}: {base_url} does not serve it, only {names}")
        rng = random.Random(0)
        pending = [[rng.randrange(max_token_id) for _ in range(input_tokens)] for _ in range(requests)]
        done: list[_Stream] = []
        cpu_before = await _cpu_seconds(client, metrics_url)
        started = time.perf_counter()

        async def worker() -> None:
            while pending:
                body = {
                    "model": card["id"],
                    "prompt": pending.pop(),
                    "max_tokens": output_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                done.append(await _stream(client, f"{base_url}/completions", body))

        async def report() -> None:
            while True:
                await asyncio.sleep(PROGRESS_PERIOD_S)
                progress(f"{len(done)} of {requests} requests done after {time.perf_counter() - started:.0f} s")

        reporter = asyncio.create_task(report())
        try:
            await asyncio.gather(*(worker() for _ in range(streams)))
        finally:
            reporter.cancel()
        wall_s = time.perf_counter() - started
        cpu_after = await _cpu_seconds(client, metrics_url)
    failed = [stream.error for stream in done if stream.error is not None]
    good = [stream for stream in done if stream.error is None]
    tokens = sum(stream.output_tokens for stream in good)
    gaps = [late - early for s in good for early, late in zip(s.times_s, s.times_s[1:], strict=False)]
    return {
        "benchmark": "http",
        "machine": machine(),
        "model": card["id"],
        "streams": streams,
        "requests": requests,
        "failed": len(failed),
        "first_error": failed[0] if failed else None,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "wall_s": wall_s,
        "output_tokens_per_s": tokens / wall_s,
        "total_tokens_per_s": (tokens + sum(s.prompt_tokens for s in good)) / wall_s,
        "ttft_s": summary([stream.times_s[0] for stream in good if stream.times_s]),
        "inter_token_s": summary(gaps),
        "e2e_s": summary([stream.end_s for stream in good]),
        "cpu_s_per_1k_tokens": {
            kind: (cpu_after[kind] - cpu_before.get(kind, 0.0)) / tokens * 1e3 for kind in cpu_after if tokens
        },
    }


def run(base_url: str, *, out: str | None, **options: Any) -> int:
    """Run the closed loop; exit status 1 when a request failed."""
    try:
        document = asyncio.run(_bench(base_url.rstrip("/"), **options))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        progress(f"error: {base_url} cannot be measured: {error}")
        return 1
    row = {
        "streams": document["streams"],
        "output tok/s": document["output_tokens_per_s"],
        "TTFT median s": document["ttft_s"]["median"],
        "TTFT p95 s": document["ttft_s"]["p95"],
        "ITL median ms": document["inter_token_s"]["median"] * 1e3,
        "E2E median s": document["e2e_s"]["median"],
        "failed": document["failed"],
    }
    progress(f"\n{table([row])}")
    write(document, out)
    return 1 if document["failed"] else 0
