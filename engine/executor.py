"""Who runs a step: the protocol, and the executor that runs one rank in this process.

`RayExecutor` (engine/ray_executor.py) runs a group of worker actors behind the same protocol.
"""

from __future__ import annotations

from typing import Protocol

from engine.config import EngineConfig
from engine.msa.cache import IndexCache
from engine.runner import ModelRunner
from engine.types import EngineInfo, StepPlan, StepResult


class Executor(Protocol):
    """Runs StepPlans in order. Raises EngineDead when the group cannot go on; nothing can be submitted after that.

    max_in_flight: how many steps may be submitted and not collected. From 2 on, rows may stand on a token that a
    step in flight samples: the plan knows its position, only the executor its value. Such a row may also belong to
    a request that has ended with that token, which the plan could not know: it runs like any other, on the
    request's slot and pages as they were when it was planned, and its result is ignored.
    """

    info: EngineInfo
    max_in_flight: int

    def submit(self, plan: StepPlan) -> None:
        """Start a step; returns before it is done where the backend allows it."""

    def collect(self) -> StepResult:
        """The result of the oldest submitted step; waits for it."""

    def close(self) -> None:
        """Free everything: pages, weights, processes. Safe to call twice."""


class InlineExecutor:
    """One rank, in this process, without Ray."""

    def __init__(self, config: EngineConfig) -> None:
        self._runner: ModelRunner | None = ModelRunner(config, rank=0, world_size=1)
        proposal = self._runner.load()
        self.info = self._runner.allocate(proposal.num_pages)
        self.max_in_flight = self.info.max_in_flight

    @property
    def index_cache(self) -> IndexCache:
        """The shared selection of the model, for tests and analysis."""
        assert self._runner is not None, "the executor is closed"
        return self._runner.model.index_cache

    def submit(self, plan: StepPlan) -> None:
        assert self._runner is not None, "the executor is closed"
        self._runner.launch(plan)

    def collect(self) -> StepResult:
        assert self._runner is not None, "the executor is closed"
        return self._runner.collect()

    def close(self) -> None:
        self._runner = None
