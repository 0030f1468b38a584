"""A service of one engine: when that is lost, streams wait for its replacement, up to a limit."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.faults.blows import ENGINE_FAULTS, hit_rank
from tests.faults.fleet import open_fleet
from tests.faults.guarantees import (
    Undisturbed,
    assert_true,
    assert_unbroken,
    endure,
    enter,
)
from tests.faults.ledger import Ledger
from tests.faults.streams import Record, run_streams

SERVICE = "1 engine x TP2, 1 ingress"
pytestmark = pytest.mark.full


def test_streams_wait_for_the_replacement(cluster: Cluster, poisoned: Path, ledger: Ledger) -> None:
    with open_fleet(cluster, poisoned) as fleet:
        undisturbed = Undisturbed.run(fleet, max_tokens=ledger.max_tokens)
        for fault in ("rank 0 killed", "rank 0 stopped"):
            row = ledger.open(fault, SERVICE)
            for round_ in range(ledger.rounds):
                endure(fleet, undisturbed, row, ENGINE_FAULTS[fault], round_=round_)
            assert row.moved >= row.streams, row
            assert_unbroken(row)


def test_streams_end_with_an_error_at_the_limit(cluster: Cluster, poisoned: Path, ledger: Ledger) -> None:
    """The replacement takes longer than failover_timeout_s."""
    row = ledger.open("engine replica killed, failover_timeout_s 1", SERVICE)
    with open_fleet(cluster, poisoned, failover_timeout_s=1.0) as fleet:
        undisturbed = Undisturbed.run(fleet, max_tokens=ledger.max_tokens)
        for round_ in range(ledger.rounds):
            records = endure(fleet, undisturbed, row, ENGINE_FAULTS["engine replica killed"], round_=round_)
            expect_errors(records, "within 1 s (failover_timeout_s)")
    assert (row.refused, row.whole, row.cut) == (row.streams, 0, 0), row
    assert_true(row)


def test_retries_are_bounded(cluster: Cluster, poisoned: Path, ledger: Ledger) -> None:
    """The replacement is killed too, and retry_limit is 1."""
    row = ledger.open("rank killed, then in the replacement, retry_limit 1", SERVICE)
    with open_fleet(cluster, poisoned, retry_limit=1) as fleet:
        undisturbed = Undisturbed.run(fleet, max_tokens=ledger.max_tokens)
        moved, given_up = fleet.num_moved(), fleet.series("m3_failovers_given_up_total")
        lost: set[int] = set()

        kill = hit_rank(0, signal.SIGKILL)

        async def strike_twice(records: Sequence[Record]) -> None:
            for _ in range(2):
                num_tokens = [len(record.token_ids) for record in records]
                lost.update(await (await asyncio.to_thread(kill, fleet))())
                row.hits += 1
                while row.hits % 2 and any(len(r.token_ids) < n + 2 for r, n in zip(records, num_tokens, strict=True)):
                    await asyncio.sleep(0.005)

        for _ in range(ledger.rounds):
            records = asyncio.run(run_streams(fleet.url, undisturbed.requests, after_tokens=8, strike=strike_twice))
            fleet.wait_until_whole(without=lost)
            fleet.wait_until_idle()
            enter(row, records, undisturbed.records)
            expect_errors(records, "given up after 1 resubmissions")
        row.moved = fleet.num_moved() - moved
        assert row.moved == row.streams, row
        assert fleet.series("m3_failovers_given_up_total") == given_up + row.streams
    assert (row.refused, row.whole, row.cut) == (row.streams, 0, 0), row
    assert_true(row)


def expect_errors(records: Sequence[Record], message: str) -> None:
    """Each stream got an error object that says why, in its place, and nothing after it but the end."""
    for record in records:
        assert record.error is not None and record.error["code"] == "engine_unavailable", record
        assert message in record.error["message"], record.error
        # Before the first token the answer is a 503 of its own.
        assert (record.status, record.num_done) in ((200, 1), (503, 0)), record
