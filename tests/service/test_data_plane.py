"""Tokens from a real engine replica to an EngineClient: order, batching, aborts, refusals, loss of a replica."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray
import zmq
import zmq.asyncio
from prometheus_client import REGISTRY

from engine import LLM
from engine.errors import EngineDead, Overloaded, RequestError
from engine.transport import Gate, Header, Kind, bind_pull, connect_push, encode, new_token, pack
from engine.types import EngineRequest, FinishReason, RequestEvent, SamplingParams
from service.batcher import Batcher
from service.messages import Accepted, StepEvents, Submit, SubmitReply
from service.settings import ServiceSettings
from service.stream import EngineClient
from tests.cluster import LOOPBACK, Cluster, engine_client, process_exists, wait_until, wait_until_async

ENGINE: dict[str, Any] = {"max_model_len": 4096, "max_num_seqs": 4, "num_pages": 160, "max_num_batched_tokens": 512}
PROMPTS = [[3, 4, 5], list(range(20, 180)), [9] * 300, [77, 11]]


def sampling(seed: int, max_tokens: int = 24, **others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **others)


async def collect(events: Any) -> list[int]:
    """All tokens of a stream; checks that it ends once and that no event is missing."""
    token_ids: list[int] = []
    finish_reason = None
    async for event in events:
        assert finish_reason is None
        assert event.index == len(token_ids)
        token_ids += event.token_ids
        finish_reason = event.finish_reason
    assert finish_reason is FinishReason.LENGTH
    return token_ids


def series(cluster: Cluster, name: str) -> float:
    """Value of a series of the engine under test."""
    with urllib.request.urlopen(cluster.metrics_url, timeout=5) as reply:
        text = reply.read().decode()
    return sum(
        float(value) for value in re.findall(rf'^{name}{{[^\n]*model_name="plane"[^\n]*}} (\S+)$', text, re.MULTILINE)
    )


@pytest.fixture(scope="module")
def settings(cluster: Cluster, checkpoint: Path) -> ServiceSettings:
    return cluster.settings(checkpoint, served_model_name="plane", max_queued_requests=2, **ENGINE)


@pytest.fixture(scope="module")
def handle(cluster: Cluster, settings: ServiceSettings) -> Iterator[Any]:
    with cluster.engine(settings) as handle:
        yield handle


@pytest.fixture(autouse=True)
def idle_engine(cluster: Cluster, handle: Any) -> None:
    """What an earlier test aborted is gone."""
    wait_until(lambda: series(cluster, "m3_kv_cache_usage_perc") == 0, timeout_s=10, what="an idle engine")


def offline(checkpoint: Path, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    llm = LLM(checkpoint, backend="torch", dtype="float32", num_threads=1, **ENGINE)
    try:
        return [output.token_ids for output in llm.generate(prompts, params)]
    finally:
        llm.close()


def test_concurrent_streams_give_the_offline_tokens(settings: ServiceSettings, handle: Any, checkpoint: Path) -> None:
    params = [sampling(seed, logprobs=2) for seed in range(len(PROMPTS))]

    async def run() -> list[list[int]]:
        async with engine_client(settings, handle) as client:
            streams = [client.generate(EngineRequest("same id", p, s)) for p, s in zip(PROMPTS, params, strict=True)]
            tokens = await asyncio.gather(*map(collect, streams))
            assert client.num_submits == 1, "streams that start together leave together"
            assert client.ready()
            assert (await client.info()).plan == "DDFFF"
            return tokens

    assert asyncio.run(run()) == offline(checkpoint, PROMPTS, params)


def test_events_that_nobody_takes_are_merged(settings: ServiceSettings, handle: Any) -> None:
    """Log-probabilities stay aligned with the tokens of a merged event."""

    async def run() -> list[RequestEvent]:
        async with engine_client(settings, handle) as client:
            params = sampling(1, 64, logprobs=1, prompt_logprobs=0)
            events = []
            async for event in client.generate(EngineRequest("r", [5, 6, 7], params)):
                events.append(event)
                await asyncio.sleep(0.5)
            return events

    events = asyncio.run(run())
    assert len(events) < 16
    assert [len(event.logprobs or []) for event in events] == [len(event.token_ids) for event in events]
    for event in events:
        assert all(token in entry for token, entry in zip(event.token_ids, event.logprobs or [], strict=True))
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * (len(events) - 1)


def test_a_slow_reader_is_cut_off(settings: ServiceSettings, handle: Any) -> None:
    async def run() -> RequestEvent:
        narrow = settings.model_copy(update={"max_undelivered_tokens": 8})
        async with engine_client(narrow, handle) as client:
            stream = client.generate(EngineRequest("r", [5, 6, 7], sampling(1, 3000)))
            event = await anext(stream)
            while event.finish_reason is None:
                await asyncio.sleep(0.5)
                event = await anext(stream)
            return event

    event = asyncio.run(run())
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None and "limit 8" in event.error


def test_closing_a_stream_frees_its_pages(cluster: Cluster, settings: ServiceSettings, handle: Any) -> None:
    def idle() -> bool:
        return series(cluster, "m3_kv_cache_usage_perc") == 0

    async def run() -> None:
        before = series(cluster, "m3_generation_tokens_total")
        async with engine_client(settings, handle) as client:
            async with aclosing(client.generate(EngineRequest("r", [8] * 500, sampling(1, 3000)))) as stream:
                await anext(stream)
                await asyncio.to_thread(wait_until, lambda: not idle(), timeout_s=10, what="pages in use")
            await asyncio.to_thread(wait_until, idle, timeout_s=10, what="free pages")
            after = series(cluster, "m3_generation_tokens_total")
            assert after - before < 1000, "it ran on after the abort"
            await asyncio.sleep(0.3)
            assert series(cluster, "m3_generation_tokens_total") == after

    asyncio.run(run())


def test_refusals_come_before_the_first_event(settings: ServiceSettings, handle: Any) -> None:
    async def run() -> None:
        async with engine_client(settings, handle) as client:
            bad = client.generate(EngineRequest("r", [1] * 5000, sampling(1)))
            good = client.generate(EngineRequest("r", [1] * 5, sampling(1, 2000)))
            first, event = await asyncio.gather(anext(bad), anext(good), return_exceptions=True)
            assert isinstance(first, RequestError)
            assert (first.param, first.code) == ("prompt", "context_length_exceeded")
            assert isinstance(event, RequestEvent) and event.token_ids, "the neighbour in the batch runs on"

            others = [client.generate(EngineRequest("r", [1] * 5, sampling(i, 2000))) for i in range(7)]
            answers = await asyncio.gather(
                *(asyncio.wait_for(anext(stream), 2.0) for stream in others), return_exceptions=True
            )
            refused = [answer for answer in answers if isinstance(answer, Overloaded)]
            # 4 run and 2 wait; one of them is `good`.
            assert len(refused) == 2
            assert refused[0].retry_after_s > 0 and "limit 6" in str(refused[0])
            num_submits = client.num_submits
            assert await is_refused(client), "it is full"
            assert client.num_submits == num_submits, "the replica had told so, and was asked all the same"
            for stream in (good, *others):
                await stream.aclose()
            deadline_s = time.monotonic() + 20
            while await is_refused(client):
                assert time.monotonic() < deadline_s, "nothing runs, and the queue is still full"
                await asyncio.sleep(0.05)

    async def is_refused(client: EngineClient) -> bool:
        try:
            await collect(client.generate(EngineRequest("r", [1] * 5, sampling(1, 1))))
        except Overloaded as error:
            assert "limit 6" in str(error)
            return True
        return False

    asyncio.run(run())


class RawIngress:
    """An ingress made by hand: a socket, and submits through the handle."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.token = new_token()
        self.socket, self.endpoint = bind_pull(
            zmq.asyncio.Context(self.context), directory=None, name="", host=LOOPBACK
        )
        self.gate = Gate("test", self.token, {Kind.ACCEPTED: Accepted, Kind.EVENTS: StepEvents})

    def submit(self, handle: Any, request: EngineRequest) -> Any:
        return handle.submit.remote(encode(Submit(1, self.endpoint, self.token, [request])))

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()

    async def receive(self) -> Any:
        message = self.gate.admit(await asyncio.wait_for(self.socket.recv_multipart(), 10.0))
        assert message is not None
        return message[1]


def test_an_ingress_that_vanishes_loses_its_requests(cluster: Cluster, settings: ServiceSettings, handle: Any) -> None:
    async def run() -> SubmitReply:
        ingress = RawIngress()
        response = ingress.submit(handle, EngineRequest("vanish", [8] * 500, sampling(1, 3000)))
        assert isinstance(await ingress.receive(), Accepted)
        assert isinstance(await ingress.receive(), StepEvents)
        ingress.close()
        return msgspec.msgpack.decode(await asyncio.wait_for(response, 5.0), type=SubmitReply)

    reply = asyncio.run(run())
    assert [ended.finish_reason for ended in reply.ended] == [FinishReason.ABORT]
    assert 0 < reply.ended[0].num_output_tokens < 3000
    wait_until(lambda: series(cluster, "m3_kv_cache_usage_perc") == 0, timeout_s=5, what="free pages")


def test_strangers_on_the_token_sockets_change_nothing(
    cluster: Cluster, settings: ServiceSettings, handle: Any
) -> None:
    async def run() -> None:
        ingress = RawIngress()
        response = ingress.submit(handle, EngineRequest("mine", [8] * 5, sampling(1, 200)))
        accepted = await ingress.receive()
        dropped = series(cluster, "m3_dropped_messages_total")
        async with engine_client(settings, handle) as client:
            strangers = [connect_push(ingress.context, e) for e in (accepted.control_endpoint, client.endpoint)]
            for stranger in strangers:
                # A well-formed abort of a request that runs, but with another token.
                for frames in (pack(new_token(), Header(Kind.ABORT, 0, 0), encode([["mine"]])), [b"?"], [b""] * 3):
                    stranger.send_multipart(frames)
            tokens = await collect(client.generate(EngineRequest("r", [8] * 5, sampling(1, 200))))
            assert len(tokens) == 200
            assert client.num_dropped == 3
        reply = msgspec.msgpack.decode(await asyncio.wait_for(response, 20.0), type=SubmitReply)
        assert [(e.finish_reason, e.num_output_tokens) for e in reply.ended] == [(FinishReason.LENGTH, 200)]
        wait_until(lambda: series(cluster, "m3_dropped_messages_total") == dropped + 3, timeout_s=5, what="the count")
        for socket in (ingress.socket, *strangers):
            socket.close(linger=0)
        ingress.context.term()

    asyncio.run(run())


def test_a_lost_message_is_noticed_and_filled(settings: ServiceSettings, handle: Any, checkpoint: Path) -> None:
    """An event that skips tokens stands for a message that never came: the stream goes on from what it has."""
    params = sampling(5, 120)

    async def run() -> list[int]:
        async with engine_client(settings, handle) as client:
            stream = client.generate(EngineRequest("r", [5, 6, 7], params))
            first = await anext(stream)
            [attempt_id] = client.attempt_ids
            forged = StepEvents([RequestEvent(attempt_id, 60, [1])], [])
            sender: zmq.Socket[Any] = connect_push(context, client.endpoint)
            sender.send_multipart(pack(client.token, Header(Kind.EVENTS, 0, 0), encode(forged)))
            tokens = list(first.token_ids)
            async for event in stream:
                tokens += event.token_ids
            assert client.num_submits == 2
            sender.close()
            return tokens

    context: zmq.Context[Any] = zmq.Context()
    assert asyncio.run(run()) == offline(checkpoint, [[5, 6, 7]], [params])[0]
    context.term()


def test_an_end_that_the_replica_does_not_account_for_is_counted(settings: ServiceSettings, handle: Any) -> None:
    """And the request that nobody waits for any more ends."""
    context: zmq.Context[Any] = zmq.Context()

    async def run() -> None:
        async with engine_client(settings, handle) as client:
            stream = client.generate(EngineRequest("r", [5, 6, 7], sampling(5, 3000)))
            first = await anext(stream)
            [attempt_id] = client.attempt_ids
            sender: zmq.Socket[Any] = connect_push(context, client.endpoint)
            index = len(first.token_ids)
            while client.attempt_ids:
                # The right place is a matter of luck: the true events arrive too.
                forged = StepEvents([RequestEvent(attempt_id, index, [1], FinishReason.LENGTH)], [])
                sender.send_multipart(pack(client.token, Header(Kind.EVENTS, 0, 0), encode(forged)))
                event = await anext(stream)
                index = event.index + len(event.token_ids)
                if client.attempt_ids not in ([], [attempt_id]):
                    [attempt_id] = client.attempt_ids
            await stream.aclose()
            sender.close()
            await wait_until_async(_counted(before + 1), timeout_s=10, what="the count")

    before = mismatches()
    asyncio.run(run())
    context.term()


def mismatches() -> float:
    """As counted by the clients in this process."""
    return REGISTRY.get_sample_value("m3_token_mismatches_total", {"model_name": "plane"}) or 0.0


def _counted(number: float) -> Any:
    async def counted() -> bool:
        return mismatches() == number

    return counted


def test_what_a_replica_had_accepted_is_not_refused_for_want_of_room(settings: ServiceSettings, handle: Any) -> None:
    async def run() -> None:
        ingress = RawIngress()
        filler = [EngineRequest(f"old {i}", [8] * 5, sampling(i, 2000)) for i in range(6)]
        moved = EngineRequest("moved", [8] * 5, sampling(9, 3), resubmitted=True)
        late = EngineRequest("late", [8] * 5, sampling(9, 3))
        response = handle.submit.remote(encode(Submit(1, ingress.endpoint, ingress.token, [*filler, moved, late])))
        refused: list[str] = []
        while not refused:
            message = await ingress.receive()
            refused += [] if isinstance(message, Accepted) else [each.request_id for each in message.refusals]
        assert refused == ["late"]
        ingress.close()
        await asyncio.wait_for(response, 10.0)

    asyncio.run(run())


def test_an_ingress_that_cannot_be_reached_gets_nothing_run(
    cluster: Cluster, settings: ServiceSettings, handle: Any
) -> None:
    async def run() -> SubmitReply:
        ingress = RawIngress()
        ingress.close()
        response = ingress.submit(handle, EngineRequest("unreachable", [8] * 500, sampling(1, 3000)))
        return msgspec.msgpack.decode(await asyncio.wait_for(response, 10.0), type=SubmitReply)

    reply = asyncio.run(run())
    assert [ended.finish_reason for ended in reply.ended] == [FinishReason.ABORT]


def test_a_client_that_lost_its_socket_ends_its_streams(settings: ServiceSettings, handle: Any) -> None:
    async def run() -> None:
        async with engine_client(settings, handle) as client:
            client.check_health()
            stream = client.generate(EngineRequest("r", [5, 6, 7], sampling(1, 3000)))
            await anext(stream)
            client._socket.close(linger=0)
            with pytest.raises(EngineDead, match="token plane"):
                async for _ in stream:
                    pass
            with pytest.raises(EngineDead, match="token plane"):
                client.check_health()
            with pytest.raises(EngineDead, match="token plane"):
                await anext(client.generate(EngineRequest("r", [5, 6, 7], sampling(1))))
            assert not client.ready()

    asyncio.run(run())


@pytest.mark.parametrize("victim", ["replica", "rank"])
def test_a_stream_survives_the_death_of_its_replica(
    cluster: Cluster, checkpoint: Path, handle: Any, victim: str
) -> None:
    """Greedy and sampled streams continue token for token; nothing of the dead replica stays."""
    params = [sampling(1, 400), sampling(2, 400, temperature=0.0)]
    prompts = [[5, 6, 7], list(range(30, 200))]
    settings = cluster.settings(checkpoint, served_model_name="plane", **ENGINE)

    async def run() -> tuple[list[list[int]], list[int]]:
        async with engine_client(settings, handle) as client:
            old: list[int] = await handle.pids.remote()
            streams = [client.generate(EngineRequest("r", p, s)) for p, s in zip(prompts, params, strict=True)]
            firsts = await asyncio.gather(*map(anext, streams))
            os.kill(old[0] if victim == "replica" else old[1], signal.SIGKILL)
            tokens = [list(first.token_ids) for first in firsts]

            async def rest(i: int) -> None:
                async for event in streams[i]:
                    assert event.index == len(tokens[i])
                    tokens[i].extend(event.token_ids)

            await asyncio.wait_for(asyncio.gather(rest(0), rest(1)), 60.0)
            assert client.ready()
            new: list[int] = await handle.pids.remote()
            assert not set(old) & set(new)
            return tokens, old

    tokens, old = asyncio.run(run())
    assert tokens == offline(checkpoint, prompts, params)
    wait_until(lambda: not any(map(process_exists, old)), timeout_s=10, what="the end of the old processes")
    groups = ray.util.placement_group_table().values()
    assert sum(group["state"] == "CREATED" for group in groups) == 1


def test_without_a_replica_new_requests_fail_in_time_and_old_ones_wait(cluster: Cluster, checkpoint: Path) -> None:
    settings = cluster.settings(checkpoint, submit_timeout_s=1.0, **ENGINE)

    async def run(handle: Any) -> None:
        async with engine_client(settings, handle) as client:
            await wait_until_async(_is_ready(client), timeout_s=10, what="ready")
            old = client.generate(EngineRequest("r", [5, 6, 7], sampling(1, 400)))
            first = await anext(old)
            os.kill((await handle.pids.remote())[0], signal.SIGKILL)
            started_s = time.monotonic()
            # All the time, so that some leave in one submit with the stream that is moved.
            refusals = 0
            while client.ready() or not refusals:
                with pytest.raises(EngineDead, match=r"submit_timeout_s|resubmissions"):
                    await anext(client.generate(EngineRequest("r", [5, 6, 7], sampling(1))))
                refusals += 1
                assert time.monotonic() - started_s < 30.0
            num_tokens = len(first.token_ids)
            async for event in old:
                assert event.index == num_tokens
                num_tokens += len(event.token_ids)
            assert num_tokens == 400

    with cluster.engine(settings) as handle:
        asyncio.run(run(handle))


def _is_ready(client: Any) -> Any:
    async def ready() -> bool:
        return bool(client.ready())

    return ready


def test_batcher_groups_what_arrives_while_a_group_is_on_its_way() -> None:
    async def run() -> None:
        groups: list[list[int]] = []
        taken: list[asyncio.Future[None]] = []

        def send(group: list[int]) -> asyncio.Future[None]:
            groups.append(group)
            taken.append(asyncio.get_running_loop().create_future())
            return taken[-1]

        batcher = Batcher(send)
        batcher.add(1)
        batcher.add(2)
        await asyncio.sleep(0)
        assert groups == [[1, 2]], "a group leaves in the turn after it was added"
        batcher.add(3)
        await asyncio.sleep(0.01)
        batcher.add(4)
        assert groups == [[1, 2]]
        taken[0].set_result(None)
        await asyncio.sleep(0.01)
        assert groups == [[1, 2], [3, 4]]
        batcher.add(5)
        await asyncio.sleep(0.2)
        assert groups == [[1, 2], [3, 4], [5]], "a group that no replica takes holds up the next one only briefly"

    asyncio.run(run())
