"""The scheduler thread on a real engine: what ends it, and that its owner hears why."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import EngineCore
from engine.errors import EngineDead
from engine.executor import InlineExecutor
from engine.types import EngineRequest, FinishReason, RequestEvent, SamplingParams
from service.engine_loop import EngineLoop, EngineLoopCallbacks
from tests.cluster import wait_until

MAX_LIVE = 4


class Running:
    """An EngineLoop with everything that it reported."""

    def __init__(self, checkpoint: Path) -> None:
        config = EngineConfig.from_kwargs(
            checkpoint, backend="torch", dtype="float32", max_model_len=512, num_pages=16, num_threads=1
        )
        self.core = EngineCore(config, InlineExecutor(config))
        self.events: list[RequestEvent] = []
        self.causes: list[str] = []
        self.alive = threading.Event()
        callbacks = EngineLoopCallbacks(
            outcome=lambda events, _refusals: self.events.extend(events),
            stats=lambda _stats: None,
            death=self.causes.append,
        )
        self.loop = EngineLoop(
            self.core, callbacks, check_alive=self.alive.set, max_live_requests=MAX_LIVE, step_timeout_s=60.0
        )

    @property
    def num_finished(self) -> int:
        return sum(event.finish_reason is FinishReason.LENGTH for event in self.events)

    def finished(self) -> bool:
        return self.num_finished > 0


@pytest.fixture
def running(checkpoint: Path) -> Iterator[Running]:
    running = Running(checkpoint)
    yield running
    running.loop.close()


def request(**settings: Any) -> EngineRequest:
    return EngineRequest("r", [5] * 200, SamplingParams(max_tokens=4, seed=0, ignore_eos=True, **settings))


def test_balanced_books_of_an_idle_engine_change_nothing(running: Running) -> None:
    running.loop.add([request()])
    wait_until(running.finished, timeout_s=30, what="the end of the request")
    wait_until(lambda: running.loop._checked_at_s > 0, timeout_s=10, what="the check of an idle engine")
    running.loop.check_health()
    assert running.causes == [] and running.core.stats.page_check_failures == 0


def test_a_full_queue_refuses_at_once(running: Running) -> None:
    """Not when the step that runs has ended: that may take a second."""
    requests = [dataclasses.replace(request(), request_id=f"r{i}") for i in range(MAX_LIVE + 2)]
    refusals = running.loop.add(requests)
    assert [refusal.request_id for refusal in refusals] == [f"r{MAX_LIVE}", f"r{MAX_LIVE + 1}"]
    assert all(f"limit {MAX_LIVE} " in refusal.message and refusal.retry_after_s for refusal in refusals)
    # It was accepted once, and its tokens are with the client.
    assert running.loop.add([dataclasses.replace(requests[-1], resubmitted=True)]) == []
    wait_until(lambda: running.num_finished == MAX_LIVE + 1, timeout_s=30, what="the end of those that were taken")
    wait_until(lambda: not running.loop.add([request()]), timeout_s=5, what="room in the queue")


@pytest.mark.parametrize("harm", ["lost", "shared"])
def test_pages_that_do_not_balance_end_an_idle_engine(running: Running, harm: str) -> None:
    running.loop.add([request()])
    wait_until(running.finished, timeout_s=30, what="the end of the request")
    # A page that nobody can get any more, or one that two requests would be given.
    blank = running.core.pool._blank
    if harm == "lost":
        blank.pop()
    else:
        blank.append(blank[0])
    wait_until(lambda: bool(running.causes), timeout_s=10, what="the end of the engine")
    assert "page accounting does not balance" in running.causes[0]
    assert running.core.stats.page_check_failures == 1
    with pytest.raises(EngineDead, match="page accounting"):
        running.loop.check_health()
