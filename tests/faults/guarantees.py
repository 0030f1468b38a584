"""What must hold after a fault, checked stream by stream and entered into the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.cluster import process_exists
from tests.faults.blows import Fault
from tests.faults.fleet import Fleet
from tests.faults.ledger import Row
from tests.faults.streams import Record, bodies, run_streams

NUM_STREAMS = 32
# When the fault of a round strikes, in tokens that each stream has by then.
STRIKE_POINTS = (8, 40, 1, 80, 0)


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """Requests, and what each gets when nothing happens: the tokens to compare with."""

    requests: list[dict[str, Any]]
    records: list[Record]

    @classmethod
    def run(cls, fleet: Fleet, *, max_tokens: int) -> Undisturbed:
        """NUM_STREAMS streams at once, all of which must come to their end."""
        requests = bodies(fleet.model_name, NUM_STREAMS, max_tokens)
        records = asyncio.run(run_streams(fleet.url, requests))
        for record in records:
            assert (record.error, record.cut, record.num_done) == (None, False, 1)
            assert len(record.token_ids) == max_tokens
        return cls(requests, records)


def endure(fleet: Fleet, undisturbed: Undisturbed, row: Row, fault: Fault, *, round_: int) -> list[Record]:
    """Strike once while the streams run, and wait until the service is whole again.

    Where nothing was there to lose, since every stream had ended or ran elsewhere, the row does not show it: see
    `moved` and `cut`.
    """
    blow = fault(fleet)
    moved = fleet.num_moved()
    lost: set[int] = set()
    struck_s = 0.0

    async def strike(_records: Sequence[Record]) -> None:
        nonlocal struck_s
        lost.update(await blow())
        struck_s = time.monotonic()
        row.hits += 1

    after_tokens = STRIKE_POINTS[round_ % len(STRIKE_POINTS)]
    records = asyncio.run(run_streams(fleet.url, undisturbed.requests, after_tokens=after_tokens, strike=strike))
    fleet.wait_until_whole(without=lost)
    row.recovery_s = max(row.recovery_s, time.monotonic() - struck_s)
    fleet.wait_until_idle()
    row.moved += fleet.num_moved() - moved
    row.pages += fleet.held_pages()
    row.orphans += sum(map(process_exists, lost))
    enter(row, records, undisturbed.records)
    return records


def enter(row: Row, records: Sequence[Record], expected: Sequence[Record]) -> None:
    """Count what the streams of one round got. A stream that failed is compared as far as it came."""
    for record, wanted in zip(records, expected, strict=True):
        row.streams += 1
        row.pause_s = max(row.pause_s, record.pause_s)
        row.cut += record.cut
        row.refused += record.error is not None
        is_whole = record.finish_reasons == wanted.finish_reasons and record.num_done == 1 and record.error is None
        row.whole += is_whole
        row.tokens += len(record.token_ids)
        row.wrong += num_wrong(record.token_ids, wanted.token_ids, is_whole=is_whole)
        row.usage_wrong += is_whole and counted(record) != (counted(wanted)[0], len(record.token_ids))


def counted(record: Record) -> tuple[int, int]:
    """Prompt and output tokens of the usage. What a prefix cache found of the prompt may differ from run to run."""
    assert record.usage is not None, "no usage came"
    return record.usage["prompt_tokens"], record.usage["completion_tokens"]


def num_wrong(token_ids: Sequence[int], wanted: Sequence[int], *, is_whole: bool) -> int:
    """Tokens that differ; of a whole stream also those that are missing or too many."""
    different = sum(a != b for a, b in zip(token_ids, wanted, strict=False))
    if is_whole:
        return different + abs(len(token_ids) - len(wanted))
    return different + max(len(token_ids) - len(wanted), 0)


def assert_unbroken(row: Row) -> None:
    """Every stream came to its end with the tokens and the usage of the undisturbed run, and nothing is left over."""
    assert (row.whole, row.refused, row.cut) == (row.streams, 0, 0), row
    assert_true(row)


def assert_true(row: Row) -> None:
    """Whatever was delivered was right, and nothing is left over."""
    assert row.hits and row.tokens, row
    assert (row.wrong, row.usage_wrong, row.pages, row.orphans) == (0, 0, 0, 0), row
    row.outcome = "ok"
