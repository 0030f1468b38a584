"""Serve's side of the choice of replicas: a call goes to the replica that its caller names, if Serve still runs it."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# The module, not its functions: Serve pickles this one by value, with copies of what stands in it.
from service import running_replicas


class TargetRouter(RequestRouter):  # type: ignore[misc]
    """A call with the keyword argument `target` goes to the replica of that name. When that one is gone or takes no
    more calls, and for calls without a target: to the emptier of two that chance picks."""

    def initialize_state(self, **_settings: Any) -> None:
        """Called once by Serve."""
        running_replicas.register(self._deployment_id, self)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Serve takes the emptiest one of the first rank in which one has room."""
        target = None if pending_request is None else pending_request.kwargs.get("target")
        ranks = [[replica] for replica in candidate_replicas if replica.replica_id.unique_id == target]
        return [*ranks, random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
