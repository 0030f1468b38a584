"""Two engine replicas: prefixes find their replica, updates roll under load, the number follows the load."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from ray import serve

from engine.config import PAGE_SIZE
from engine.errors import EngineDead
from engine.types import EngineRequest, RequestEvent, SamplingParams
from service.app import build_engine
from service.running_replicas import running
from service.settings import ServiceSettings
from service.stream import EngineClient
from tests.cluster import Cluster, engine_client, wait_until_async

NAME = "replicas"
ENGINE: dict[str, Any] = {
    "served_model_name": NAME,
    "max_model_len": 8192,
    "max_num_seqs": 8,
    "num_pages": 200,
    "max_num_batched_tokens": 512,
    "index_topk_freq": 1,
}
TIMEOUT_S = 90.0
# Beyond the blocks that a selection holds, so that plans differ in what they say.
LONG = [10 + i * i % 400 for i in range(900)]


def request(prompt: list[int], max_tokens: int, seed: int = 1) -> EngineRequest:
    return EngineRequest("r", prompt, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True))


def prompt(start: int, num_tokens: int) -> list[int]:
    return [10 + (start * 37 + i * i) % 400 for i in range(num_tokens)]


async def events_of(client: EngineClient, sent: EngineRequest) -> list[RequestEvent]:
    return [event async for event in client.generate(sent)]


def tokens_of(events: list[RequestEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def routed() -> Counter[str]:
    """As counted by the clients in this process."""
    choices = ("prefix", "balanced", "overloaded")
    values = (
        REGISTRY.get_sample_value("m3_routed_requests_total", {"model_name": NAME, "choice": choice})
        for choice in choices
    )
    return Counter({choice: int(value or 0) for choice, value in zip(choices, values, strict=True)})


@pytest.fixture(scope="module")
def settings(cluster: Cluster, checkpoint: Path) -> ServiceSettings:
    return cluster.settings(checkpoint, replicas=2, graceful_shutdown_timeout_s=1.0, **ENGINE)


@pytest.fixture(scope="module")
def changed(settings: ServiceSettings) -> ServiceSettings:
    """Another plan, and as many replicas as the load asks for."""
    scaling = {"replicas": 1, "max_replicas": 2, "upscale_delay_s": 0.0, "downscale_delay_s": 1.0}
    return settings.model_copy(update={"index_topk_freq": 2} | scaling)


@pytest.fixture(scope="module")
def handle(cluster: Cluster, settings: ServiceSettings) -> Iterator[Any]:
    with cluster.engine(settings) as handle:
        yield handle


async def until_running(handle: Any, number: int, *, without: set[str] = frozenset()) -> set[str]:  # type: ignore[assignment]
    """Until so many replicas take calls, none of which is in `without`; their names."""

    async def there() -> bool:
        names = set(running(handle))
        return len(names) == number and not names & without

    await handle.describe.remote()
    await wait_until_async(there, timeout_s=TIMEOUT_S, what=f"{number} replicas")
    return set(running(handle))


def test_a_shared_prefix_is_computed_once(settings: ServiceSettings, handle: Any) -> None:
    async def run() -> list[list[int]]:
        async with engine_client(settings, handle) as client:
            await until_running(handle, 2)
            cached = []
            for group in range(6):
                shared = prompt(group, 3 * PAGE_SIZE)
                events = [await events_of(client, request([*shared, question, 7], 2)) for question in range(4)]
                cached.append([each[-1].num_cached_tokens for each in events])
            return cached

    before = routed()
    assert asyncio.run(run()) == [[0] + 3 * [3 * PAGE_SIZE]] * 6
    assert routed() - before == {"balanced": 6, "prefix": 18}


def test_a_popular_prefix_does_not_pile_up(settings: ServiceSettings, handle: Any) -> None:
    """16 requests at once take every slot of both replicas, though one holds their prefix."""

    async def run() -> Counter[str]:
        async with engine_client(settings, handle) as client:
            await until_running(handle, 2)
            shared = prompt(100, 2 * PAGE_SIZE)
            await events_of(client, request([*shared, 5], 1))
            work = [asyncio.create_task(events_of(client, request([*shared, i, 7], 60))) for i in range(16)]

            async def accepted() -> bool:
                return sum(batch.epoch is not None for batch in client._batches.values()) > 1

            await wait_until_async(accepted, timeout_s=10, what="both replicas at work")
            where: Counter[str | None] = Counter()
            for batch in client._batches.values():
                where[batch.replica_id] += len(batch.attempt_ids)
            for events in await asyncio.gather(*work):
                assert len(tokens_of(events)) == 60
            return where

    before = routed()
    assert min(asyncio.run(run()).values()) >= 6
    assert (routed() - before)["overloaded"] > 0


def test_requests_for_another_model_are_not_run(settings: ServiceSettings, handle: Any) -> None:
    """As from a front of before or after an update to another model, while some engines are of the other side."""
    other = settings.model_copy(update={"served_model_name": "other", "submit_timeout_s": 1.0})

    async def run() -> None:
        async with engine_client(other, handle) as client:
            with pytest.raises(EngineDead, match="serve another model"):
                await client.info()
            assert not client.ready()
            with pytest.raises(EngineDead, match="submit_timeout_s"):
                await events_of(client, request([1, 2, 3], 4))

    asyncio.run(run())


async def roll(settings: ServiceSettings) -> None:
    """Redeploy the engines, as `serve deploy` does with a changed config: every replica is replaced."""
    await asyncio.to_thread(serve.run, build_engine(settings), name="engine", route_prefix=None)


def test_an_update_with_another_plan_mixes_none_into_a_stream(
    settings: ServiceSettings, changed: ServiceSettings, handle: Any
) -> None:
    """A stream that outlasts graceful_shutdown_timeout_s ends with an error; what it had is of the old plan alone."""

    async def run() -> tuple[list[int], str, list[int]]:
        async with engine_client(settings, handle) as client:
            old = await until_running(handle, 2)
            before = tokens_of(await events_of(client, request(LONG, 300)))
            stream = client.generate(request(LONG, 7000))
            tokens = list((await anext(stream)).token_ids)
            update = asyncio.create_task(roll(changed))
            error = ""
            try:
                async for event in stream:
                    tokens += event.token_ids
            except EngineDead as dead:
                error = str(dead)
            num_compared = min(len(tokens), len(before))
            assert tokens[:num_compared] == before[:num_compared]
            await asyncio.wait_for(update, TIMEOUT_S)

            async def changed_over() -> bool:
                return not old & set(running(handle)) and (await client.info()).plan == "DDFSF"

            await wait_until_async(changed_over, timeout_s=TIMEOUT_S, what="the new plan alone")
            return before, error, tokens_of(await events_of(client, request(LONG, 300)))

    old_tokens, error, new_tokens = asyncio.run(run())
    assert "updated to another model or index plan" in error
    assert new_tokens != old_tokens, "the plans must differ in what they say, or nothing is shown"


def test_the_number_of_replicas_follows_the_load(changed: ServiceSettings, handle: Any) -> None:
    """Down to one and up to two again; no request is lost on the way."""

    async def run() -> None:
        async with engine_client(changed, handle) as client:
            stop = asyncio.Event()

            async def keep_asking(number: int) -> int:
                answered = 0
                while not stop.is_set():
                    assert len(tokens_of(await events_of(client, request([number, 2, 3], 40)))) == 40
                    answered += 1
                return answered

            asking = [asyncio.create_task(keep_asking(1))]
            await until_running(handle, 1)
            # Twice what one replica runs at once: the rest waits.
            asking += [asyncio.create_task(keep_asking(number)) for number in range(2, 16)]
            await until_running(handle, 2)
            stop.set()
            assert all(answered > 0 for answered in await asyncio.wait_for(asyncio.gather(*asking), TIMEOUT_S))

    asyncio.run(run())
