"""Whether some engine replica answers, and what the engine resolved at load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import msgspec

from engine.errors import EngineDead
from engine.types import EngineInfo
from service.messages import Description
from service.replica_choice import ReplicaChooser

log = logging.getLogger(__name__)

PROBE_PERIOD_S = 2.0
# A replica that does not answer a probe within this time does not count as ready.
PROBE_TIMEOUT_S = 4.0
# While an update rolls through the replicas, the first ones asked may serve another model.
MAX_ASKED = 8
_decoder = msgspec.msgpack.Decoder(Description)


class EngineProbe:
    """Asks some replica behind `handle` (a Serve DeploymentHandle) for a sign of life, now and then.

    chooser: says which replicas serve the same model as this ingress.
    """

    def __init__(self, handle: Any, chooser: ReplicaChooser) -> None:
        self._handle = handle
        self._chooser = chooser
        self._info: EngineInfo | None = None
        self._answered_at_s: float | None = None
        self._now = asyncio.Event()

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            self._now.clear()
            try:
                await self._ask()
            except Exception as error:
                log.debug("no engine replica answers: %r", error)
                self._answered_at_s = None
            # Not wait_for: on Python 3.11 it loses a cancellation that comes in the turn in which `_now` is set.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_PERIOD_S):
                    await self._now.wait()

    async def info(self) -> EngineInfo:
        """What the engine resolved at load; cached. Raises EngineDead when no replica answers in time."""
        if self._info is None:
            try:
                await self._ask()
            except Exception as error:
                raise EngineDead(f"no engine replica answers: {error!r}") from error
        assert self._info is not None
        return self._info

    def ready(self) -> bool:
        """Whether some replica answered lately."""
        return self._answered_at_s is not None and (
            time.monotonic() - self._answered_at_s < PROBE_TIMEOUT_S + PROBE_PERIOD_S
        )

    def answered(self) -> None:
        """A replica gave a sign of life by itself."""
        self._answered_at_s = time.monotonic()

    def doubt(self, *, others: bool) -> None:
        """A replica was lost: probe at once. others: whether another one is known, so that the service stays ready."""
        if not others:
            self._answered_at_s = None
        self._now.set()

    async def _ask(self) -> None:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            for _ in range(MAX_ASKED):
                reply = _decoder.decode(await self._handle.describe.remote(target=self._chooser.candidate()))
                if self._chooser.described(reply):
                    self._info = reply.info
                    self._answered_at_s = time.monotonic()
                    return
        raise EngineDead("the engine replicas that answer serve another model")
