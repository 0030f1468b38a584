"""An ingress that stops reading its socket and does not die: the engine frees what it had asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.transport import encode
from engine.types import EngineRequest, FinishReason, SamplingParams
from service.messages import Submit, SubmitReply
from tests.cluster import Cluster, engine_client
from tests.faults.guarantees import assert_unbroken, enter
from tests.faults.ledger import Ledger
from tests.faults.streams import Record

pytestmark = pytest.mark.full

# A PULL socket that reads what comes; its endpoint and token are printed.
READER = """
import zmq
from engine.transport import bind_pull, new_token
socket, endpoint = bind_pull(zmq.Context(), directory=None, name="", host="127.0.0.1")
print(endpoint, flush=True)
while True:
    socket.recv_multipart()
"""
# Silence of the connection that the engine bears, and some more.
NOTICED_WITHIN_S = 60.0
NUM_TOKENS = 7000  # more than it can run in that time


@pytest.fixture
def reader() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", READER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()


def test_a_peer_that_stops_reading_holds_no_pages(
    cluster: Cluster, poisoned: Path, ledger: Ledger, reader: tuple[subprocess.Popen[str], str]
) -> None:
    row = ledger.open("ZMQ peer stops reading", "1 engine, raw ingresses")
    settings = cluster.settings(poisoned, max_model_len=8192, num_pages=200, max_num_seqs=8)
    process, endpoint = reader

    async def others(client: Any) -> list[Record]:
        """Requests of another ingress."""
        records = [Record() for _ in range(4)]

        async def read(seed: int, record: Record) -> None:
            sampling = SamplingParams(max_tokens=200, seed=seed, ignore_eos=True, logit_bias={500: -100.0})
            async for event in client.generate(EngineRequest("r", [5, 6, 7 + seed], sampling)):
                record.token_ids += event.token_ids
                record.finish_reasons += [] if event.finish_reason is None else [event.finish_reason]
            record.usage = {"prompt_tokens": 3, "completion_tokens": len(record.token_ids)}
            record.num_done = 1

        await asyncio.gather(*(read(seed, record) for seed, record in enumerate(records)))
        return records

    async def run(handle: Any) -> SubmitReply:
        async with engine_client(settings, handle) as client:
            expected = await others(client)
            sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=1, ignore_eos=True, logit_bias={500: -100.0})
            request = EngineRequest("deaf", [8] * 500, sampling)
            response = handle.submit.remote(encode(Submit(1, endpoint, bytes(16), [request])))
            await asyncio.sleep(0.5)
            os.kill(process.pid, signal.SIGSTOP)
            row.hits += 1
            enter(row, await others(client), expected)
            return msgspec.msgpack.decode(await asyncio.wait_for(response, NOTICED_WITHIN_S), type=SubmitReply)

    with cluster.engine(settings) as handle:
        reply = asyncio.run(run(handle))
    assert [ended.finish_reason for ended in reply.ended] == [FinishReason.ABORT]
    assert 0 < reply.ended[0].num_output_tokens < NUM_TOKENS
    assert_unbroken(row)
