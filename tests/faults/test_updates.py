"""The service is redeployed while streams run, as `serve deploy` does with a changed config."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from ray import serve

from engine.types import EngineRequest, SamplingParams
from service.app import build, build_engine
from service.settings import ServiceSettings
from service.stream import EngineClient
from tests.checkpoints import make_checkpoint
from tests.cluster import Cluster, engine_client, wait_until_async
from tests.faults.blows import Blow, Fault
from tests.faults.fleet import APPLICATION, Fleet, open_fleet
from tests.faults.guarantees import Undisturbed, assert_unbroken, endure, num_wrong
from tests.faults.ledger import Ledger
from tests.faults.streams import ask_until

SERVICE = "2 engines, 2 ingresses"
TIMEOUT_S = 120.0
pytestmark = pytest.mark.full


def redeploy(settings: ServiceSettings, answered: list[str]) -> Fault:
    """Replace every replica, and send requests all the while. answered: what came of them is added."""

    def fault(fleet: Fleet) -> Blow:
        old = {pid for group in fleet.groups() for pid in group.pids} | set(fleet.ingresses())

        async def blow() -> set[int]:
            update = asyncio.create_task(
                asyncio.to_thread(serve.run, build(settings), name=APPLICATION, route_prefix="/")
            )
            answered.extend(await ask_until(update, fleet.url, fleet.model_name))
            await update
            return old

        return blow

    return fault


@pytest.mark.parametrize("is_other", [False, True], ids=["same settings", "another checkpoint and plan"])
def test_an_update_loses_no_request(
    cluster: Cluster, poisoned: Path, ledger: Ledger, tmp_path: Path, is_other: bool
) -> None:
    """Streams finish where they are, within graceful_shutdown_timeout_s, by the weights and plan they began with."""
    change: dict[str, Any] = {}
    if is_other:
        change = {"model": str(make_checkpoint(tmp_path, seed=1)), "index_topk_freq": 1}
    row = ledger.open(f"redeployed, {'another checkpoint and index plan' if is_other else 'same settings'}", SERVICE)
    answered: list[str] = []
    # Loading takes CPUs that others wait for: that must not look like a fault.
    patient = {"step_timeout_s": 60.0, "silence_timeout_s": 60.0, "health_check_timeout_s": 60.0}
    with open_fleet(
        cluster,
        poisoned,
        replicas=2,
        ingress_replicas=2,
        tensor_parallel_size=1,
        graceful_shutdown_timeout_s=60.0,
        **patient,
    ) as fleet:
        undisturbed = Undisturbed.run(fleet, max_tokens=2 * ledger.max_tokens)
        records = endure(
            fleet, undisturbed, row, redeploy(fleet.settings.model_copy(update=change), answered), round_=0
        )
        row.streams += len(answered)
        row.whole += answered.count("whole")
        assert fleet.series("m3_token_mismatches_total") == 0
    assert set(answered) | {str(record.error) for record in records} == {"whole", "None"}
    assert row.moved == 0, row
    assert_unbroken(row)


def test_an_update_with_the_same_plan_moves_what_outlasts_it(
    cluster: Cluster, checkpoint: Path, ledger: Ledger
) -> None:
    """One ingress that stays, engines that are killed after a second: equal tokens, but elsewhere."""
    row = ledger.open("redeployed, same settings, graceful_shutdown_timeout_s 1", "2 engines, 1 client")
    settings = cluster.settings(
        checkpoint,
        served_model_name="updates",
        replicas=2,
        max_num_seqs=16,
        num_pages=400,
        graceful_shutdown_timeout_s=1.0,
    )
    params = [SamplingParams(max_tokens=800, seed=seed, ignore_eos=True) for seed in range(16)]
    requests = [EngineRequest("r", [7 + seed, 8, 9], each) for seed, each in enumerate(params)]

    async def tokens(client: EngineClient, request: EngineRequest) -> list[int]:
        return [token_id async for event in client.generate(request) for token_id in event.token_ids]

    async def run(handle: Any) -> None:
        async with engine_client(settings, handle) as client:
            expected = await asyncio.gather(*(tokens(client, request) for request in requests))
            moved = num_moved()
            work = [asyncio.create_task(tokens(client, request)) for request in requests]

            async def accepted() -> bool:
                return bool(client._batches) and all(batch.epoch is not None for batch in client._batches.values())

            await wait_until_async(accepted, timeout_s=10, what="acceptance")
            update = asyncio.create_task(
                asyncio.to_thread(serve.run, build_engine(settings), name="engine", route_prefix=None)
            )
            for got, wanted in zip(await asyncio.wait_for(asyncio.gather(*work), TIMEOUT_S), expected, strict=True):
                row.tokens += len(got)
                row.wrong += num_wrong(got, wanted, is_whole=True)
                row.whole += 1
            await update
            row.hits, row.streams = 1, len(requests)
            row.moved = num_moved() - moved

    with cluster.engine(settings) as handle:
        asyncio.run(run(handle))
    assert row.moved > 0, row
    assert_unbroken(row)


def num_moved() -> int:
    """As counted by the clients in this process."""
    labels = {"model_name": "updates", "cause": "replica_lost"}
    return int(REGISTRY.get_sample_value("m3_failovers_total", labels) or 0)
