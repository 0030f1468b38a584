"""Prefix routing against the choice by chance, on two real engines whose pages hold only a part of the prefixes."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from deploy.demo import CHECKPOINT
from engine.config import PAGE_SIZE
from engine.types import EngineRequest, SamplingParams
from service.stream import EngineClient
from tests.cluster import Cluster, engine_client

NUM_DOCUMENTS = 12
NUM_QUESTIONS = 10
DOCUMENT_PAGES = 8
CONCURRENCY = 4
# 12 documents take 96 pages: one engine cannot keep them all, two can.
NUM_PAGES = 76
pytestmark = pytest.mark.full


@dataclass(slots=True)
class Outcome:
    """Of all requests. ttft_s: from the call to the first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


def requests() -> list[EngineRequest]:
    """Every question about every document, in an order that chance fixes once."""
    documents = [
        [100 + (number * 971 + i * i * 7) % 3000 for i in range(DOCUMENT_PAGES * PAGE_SIZE)]
        for number in range(NUM_DOCUMENTS)
    ]
    made = [
        EngineRequest("r", [*document, 50 + question, 7], SamplingParams(max_tokens=8, temperature=0.0, seed=1))
        for document in documents
        for question in range(NUM_QUESTIONS)
    ]
    random.Random(3).shuffle(made)
    return made


async def ask_all(client: EngineClient) -> Outcome:
    outcome, queue = Outcome(), requests()

    async def ask() -> None:
        while queue:
            request = queue.pop()
            started_s = time.monotonic()
            first = True
            async for event in client.generate(request):
                if first:
                    outcome.ttft_s.append(time.monotonic() - started_s)
                    outcome.prompt_tokens += len(request.prompt_token_ids)
                    outcome.cached_tokens += event.num_cached_tokens
                first = False

    await asyncio.gather(*(ask() for _ in range(CONCURRENCY)))
    return outcome


def run(cluster: Cluster, *, prefix_routing: bool) -> Outcome:
    settings = cluster.settings(
        CHECKPOINT,
        served_model_name="prefixes",
        replicas=2,
        prefix_routing=prefix_routing,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=8,
        num_pages=NUM_PAGES,
        max_num_batched_tokens=512,
    )

    async def work(handle: Any) -> Outcome:
        async with engine_client(settings, handle) as client:
            await client.info()
            return await ask_all(client)

    with cluster.engine(settings) as handle:
        return asyncio.run(work(handle))


def test_prefix_routing_finds_more_of_the_prompts_in_the_cache(cluster: Cluster) -> None:
    by_chance = run(cluster, prefix_routing=False)
    by_prefix = run(cluster, prefix_routing=True)
    for name, outcome in (("by chance", by_chance), ("by prefix", by_prefix)):
        p50, p95 = statistics.median(outcome.ttft_s), statistics.quantiles(outcome.ttft_s, n=20)[-1]
        print(f"{name}: hit rate {outcome.hit_rate:.3f}, TTFT p50 {p50 * 1e3:.0f} ms, p95 {p95 * 1e3:.0f} ms")
    # Each document is computed once; the rest is found.
    assert by_prefix.hit_rate > 0.8
    assert by_prefix.hit_rate > by_chance.hit_rate + 0.1
