"""The Ray actor of one rank, as its executor sees it: the executor's process places it, and never loads torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a rank runs and listens. store_port: of the rendezvous, set by rank 0 of a group of several."""

    node_id: str
    pid: int
    endpoint: str
    store_port: int | None


class RankActor:
    """Makes an engine.worker.Worker in the actor's process, and passes calls to it."""

    def __init__(self, config: EngineConfig, *, rank: int, world_size: int) -> None:
        # By name: whoever imports this module, to place the actor, would load torch with it.
        worker = importlib.import_module("engine.worker")
        self._worker = worker.Worker(config, rank=rank, world_size=world_size)

    def call(self, method: str, *args: Any) -> Any:
        """What `method` of the Worker returns."""
        return getattr(self._worker, method)(*args)
