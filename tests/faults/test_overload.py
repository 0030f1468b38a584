"""More requests than a service can take: what it refuses it refuses at once, the others go on, nothing stays behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, wait_until
from tests.faults.fleet import Fleet, open_fleet
from tests.faults.ledger import Ledger
from tests.faults.load_row import LoadRow
from tests.faults.open_loop import Outcome, ask_health, mixture, offer, percentile, saturate

SERVICE = "1 engine x TP1, 1 ingress"
MAX_NUM_SEQS, MAX_QUEUED = 8, 16
MAX_TOKENS, LONG_TOKENS = 96, 1500
OVERLOAD = 3.0
SECONDS, WARM_UP_S = 120.0, 15.0
# A shared machine: no promise, but a refusal that waits for a step or a place in the queue takes longer.
REFUSAL_LIMIT_S = 2.0
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, checkpoint: Path) -> Iterator[Fleet]:
    with open_fleet(
        cluster,
        checkpoint,
        tensor_parallel_size=1,
        max_num_seqs=MAX_NUM_SEQS,
        max_queued_requests=MAX_QUEUED,
        # So few that all have been in use after a moment: from then on memory should not grow.
        num_pages=120,
        # A machine that is busy with other things is no reason to fail.
        step_timeout_s=60.0,
        silence_timeout_s=60.0,
        submit_timeout_s=60.0,
    ) as fleet:
        yield fleet


def requests(fleet: Fleet, seed: int) -> Iterator[dict[str, Any]]:
    return mixture(fleet.model_name, vocab_size=500, max_tokens=MAX_TOKENS, long_tokens=LONG_TOKENS, seed=seed)


def endure(fleet: Fleet, row: LoadRow, *, seconds: float, warm_up_s: float) -> list[Outcome]:
    """Measure what it takes, offer three times as much, wait until it is idle, and count what is left over."""
    row.capacity = asyncio.run(saturate(fleet.url, requests(fleet, 0), clients=MAX_NUM_SEQS, seconds=warm_up_s))
    fleet.wait_until_idle()
    num_tasks = fleet.num_tasks()
    with Memory(fleet, after_s=seconds / 2) as memory:
        outcomes, health_s = asyncio.run(overload(fleet, rate=OVERLOAD * row.capacity, seconds=seconds))
    row.enter(outcomes, seconds=seconds)
    row.health_p50_ms, row.health_p99_ms = (1000 * percentile(health_s, share) for share in (0.5, 0.99))
    row.rss_mb = ", ".join(f"{name} {grown:+.1f}" for name, grown in memory.growth_mb.items())
    wait_until(lambda: open_requests(fleet) == 0, timeout_s=60, what="the end of every request")
    fleet.wait_until_idle()
    row.pages, row.requests = fleet.held_pages(), open_requests(fleet)
    row.tasks = max(0, fleet.num_tasks() - num_tasks)
    return outcomes


async def overload(fleet: Fleet, *, rate: float, seconds: float) -> tuple[list[Outcome], list[float]]:
    """What the clients saw, and how long GET /health took meanwhile, in seconds."""
    asking = asyncio.create_task(ask_health(fleet.url))
    outcomes = await offer(fleet.url, requests(fleet, 1), rate=rate, seconds=seconds)
    asking.cancel()
    return outcomes, await asking


def open_requests(fleet: Fleet) -> int:
    names = ("m3_engine_open_requests", "m3_num_requests_running", "m3_num_requests_waiting")
    return int(sum(fleet.series(name) for name in names))


class Memory:
    """Resident memory of every process of the service: what it grew by between `after_s` and the end, in MB."""

    def __init__(self, fleet: Fleet, *, after_s: float) -> None:
        self._pids = fleet.everything()
        self._before: dict[str, float] = {}
        self._timer = threading.Timer(after_s, lambda: self._before.update(self._read()))
        self.growth_mb: dict[str, float] = {}

    def _read(self) -> dict[str, float]:
        return {name: _resident_mb(pid) for name, pid in self._pids.items()}

    def __enter__(self) -> Memory:
        self._timer.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._timer.join()
        after = self._read()
        self.growth_mb = {name: after[name] - self._before[name] for name in after}


def _resident_mb(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def check(row: LoadRow, outcomes: list[Outcome]) -> None:
    """Whoever was accepted got everything, whoever was not was told so and when to come back; nothing is left over."""
    assert {outcome.status for outcome in outcomes} == {200, 429}, [o for o in outcomes if o.status not in (200, 429)][
        :3
    ]
    for outcome in outcomes:
        if outcome.status == 429:
            assert outcome.retry_after is not None and int(outcome.retry_after) >= 1
    assert row.broken == 0, [o.error for o in outcomes if o.status == 200 and not o.is_whole][:3]
    assert row.accepted > MAX_NUM_SEQS + MAX_QUEUED and row.refused > row.offered / 4, row
    assert row.refused_p50_ms < 1000 * REFUSAL_LIMIT_S, row
    assert (row.pages, row.requests, row.tasks) == (0, 0, 0), row
    row.outcome = "ok"


def test_three_times_the_capacity(fleet: Fleet, ledger: Ledger) -> None:
    row = ledger.open_load(f"3 x capacity for {SECONDS:g} s", SERVICE)
    outcomes = endure(fleet, row, seconds=SECONDS, warm_up_s=WARM_UP_S)
    check(row, outcomes)
    assert fleet.series("m3_page_check_failures_total") == fleet.series("m3_token_mismatches_total") == 0
