"""Groups the requests that arrive while an earlier group is on its way to a replica.

No timer delays a lone request: it leaves in the same turn of the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# A group that no replica takes, because none is up, must not hold up the next ones for longer.
MAX_HOLD_S = 0.05


class Batcher(Generic[T]):
    """Calls `send` with everything that was added since the last call; at most one call waits for its answer.

    send: returns at once; what it returns is done when a replica has the group, or never will.
    """

    def __init__(self, send: Callable[[list[T]], Awaitable[object]]) -> None:
        self._send = send
        self._waiting: list[T] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, item: T) -> None:
        """Send `item` with its neighbours, as soon as possible."""
        self._waiting.append(item)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            sent = asyncio.ensure_future(self._send(group))
            await asyncio.wait([sent], timeout=MAX_HOLD_S)
