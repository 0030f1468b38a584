"""When requests leave: at times of their own (open loop), or when others have ended (closed loop)."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from service.bench.serving.client import Outcome
from service.bench.serving.workload import Prompt

Send = Callable[[Prompt, float | None], Awaitable[Outcome]]


def arrival_times(count: int, *, rate: float, burstiness: float, seed: int) -> list[float | None]:
    """When each request is due, in seconds from the start; None throughout for an infinite rate.

    Gaps are gamma-distributed with mean 1/rate and shape `burstiness`: 1 is a Poisson process, below it requests come
    in bursts, infinity is a constant gap. The first request is due at 0.
    """
    if math.isinf(rate):
        return [None] * count
    rng = random.Random(seed)
    times: list[float | None] = []
    now_s = 0.0
    for _ in range(count):
        times.append(now_s)
        now_s += 1 / rate if math.isinf(burstiness) else rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


class Load:
    """One run. `outcomes` grows as requests end; `peak` is the most that ran at the same time."""

    def __init__(self, send: Send, *, max_concurrency: int | None) -> None:
        self.outcomes: list[Outcome] = []
        self.num_running = 0
        self.peak = 0
        self.started_s = 0.0
        self.wall_s = 0.0
        self._send = send
        self._room = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def run(self, prompts: Sequence[Prompt], times: Sequence[float | None]) -> None:
        """Send every prompt at its time, or as soon as there is room, and wait until all have ended."""
        self.started_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for prompt, offset_s in zip(prompts, times, strict=True):
                    due_s = None if offset_s is None else self.started_s + offset_s
                    if due_s is not None:
                        await asyncio.sleep(due_s - time.perf_counter())
                    group.create_task(self._one(prompt, due_s))
        finally:
            self.wall_s = time.perf_counter() - self.started_s

    async def _one(self, prompt: Prompt, due_s: float | None) -> None:
        if self._room is None:
            await self._exchange(prompt, due_s)
            return
        async with self._room:
            await self._exchange(prompt, due_s)

    async def _exchange(self, prompt: Prompt, due_s: float | None) -> None:
        self.num_running += 1
        self.peak = max(self.peak, self.num_running)
        try:
            self.outcomes.append(await self._send(prompt, due_s))
        finally:
            self.num_running -= 1
