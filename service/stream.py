"""The ingress's side of the token plane: one event stream per request, whatever happens to the replica behind it.

Loads no torch. All calls are made on the event loop that called `start`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from engine.types import EngineInfo, EngineRequest, RequestEvent
from service.settings import ServiceSettings


class EngineClient:
    """Sends requests to engine replicas and yields their events. One per ingress process."""

    def __init__(self, settings: ServiceSettings) -> None:
        raise NotImplementedError

    async def start(self, handle: Any) -> None:
        """Bind the event socket and begin to watch the replicas behind `handle` (a Serve DeploymentHandle)."""
        raise NotImplementedError

    async def close(self) -> None:
        """End every stream with EngineDead and free the sockets. Safe to call twice."""
        raise NotImplementedError

    def generate(self, request: EngineRequest) -> AsyncGenerator[RequestEvent, None]:
        """Events of one request, in order and without gaps; the last one has a finish_reason.

        The request leaves at the first `__anext__`: streams that are started in one turn of the event loop (the
        prompts of one HTTP request) leave in one submit. Events that pile up while the caller is busy are merged
        into one: `token_ids` may hold many tokens. Use `contextlib.aclosing`: closing the generator early aborts
        the request in the engine. `request.sampling.seed` must be set. `request.request_id` need not be unique.

        Raises RequestError (the engine refuses the request) or Overloaded (bounded queue full) before the first
        event, and EngineDead when no replica answers or the retry limit is used up, at any point. A finish_reason
        ERROR comes with `event.error`.
        """
        raise NotImplementedError

    async def info(self) -> EngineInfo:
        """What the engine resolved at load; cached. Raises EngineDead when no replica answers in time."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether some replica answered lately."""
        raise NotImplementedError
