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
NUM_QUESTIONS = 5
DOCUMENT_PAGES = 6
CONCURRENCY = 4
# 12 documents take 72 pages: one engine cannot keep them all, two can.
NUM_PAGES = 56
# By chance and by prefix in turn, each on documents of its own: what else the machine does meets both.
NUM_PHASES = 4
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


def requests(phase: int) -> list[EngineRequest]:
    """Every question about every document of a phase, in an order that chance fixes once."""
    documents = [
        [100 + ((phase * NUM_DOCUMENTS + number) * 971 + i * i * 7) % 3000 for i in range(DOCUMENT_PAGES * PAGE_SIZE)]
        for number in range(NUM_DOCUMENTS)
    ]
    made = [
        EngineRequest("r", [*document, 50 + question, 7], SamplingParams(max_tokens=8, temperature=0.0, seed=1))
        for document in documents
        for question in range(NUM_QUESTIONS)
    ]
    random.Random(3).shuffle(made)
    return made


async def ask_all(client: EngineClient, queue: list[EngineRequest], outcome: Outcome) -> None:
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


def test_prefix_routing_finds_more_of_the_prompts_in_the_cache(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = cluster.settings(
        CHECKPOINT,
        served_model_name="prefixes",
        replicas=2,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=8,
        num_pages=NUM_PAGES,
        max_num_batched_tokens=512,
    )
    outcomes = {False: Outcome(), True: Outcome()}

    async def run(handle: Any) -> None:
        for phase in range(NUM_PHASES):
            by_prefix = bool(phase % 2)
            chosen = settings.model_copy(update={"prefix_routing": by_prefix})
            async with engine_client(chosen, handle) as client:
                await client.info()
                await ask_all(client, requests(phase), outcomes[by_prefix])

    with cluster.engine(settings) as handle:
        asyncio.run(run(handle))
    for by_prefix, outcome in outcomes.items():
        p50, p95 = statistics.median(outcome.ttft_s), statistics.quantiles(outcome.ttft_s, n=20)[-1]
        with capsys.disabled():
            print(
                f"\n{'by prefix' if by_prefix else 'by chance'}: {len(outcome.ttft_s)} requests, hit rate "
                f"{outcome.hit_rate:.3f}, TTFT p50 {p50 * 1e3:.0f} ms, p95 {p95 * 1e3:.0f} ms"
            )
    # A document is computed once, and the other questions about it find it.
    assert outcomes[True].hit_rate > 0.7
    assert outcomes[True].hit_rate > outcomes[False].hit_rate + 0.1
