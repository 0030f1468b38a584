"""The faults: each strikes processes that the fleet reports, and returns those that must be gone in the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

from tests.faults.fleet import Fleet

Fault = Callable[[Fleet], Awaitable[set[int]]]

# An ingress that stands still for less than it takes Serve to give it up.
SHORT_STOP_S = 2.0


def hit_rank(rank: int, number: signal.Signals) -> Fault:
    """Signal one rank of one engine replica: the whole group must go."""

    async def fault(fleet: Fleet) -> set[int]:
        group = (await asyncio.to_thread(fleet.groups))[0]
        os.kill(group.workers[rank], number)
        return group.pids

    return fault


def hit_replica(number: signal.Signals) -> Fault:
    """Signal the process of one engine replica, the one that owns the workers."""

    async def fault(fleet: Fleet) -> set[int]:
        group = (await asyncio.to_thread(fleet.groups))[0]
        os.kill(group.replica, number)
        return group.pids

    return fault


async def kill_every_replica(fleet: Fleet) -> set[int]:
    """All engines at once: every stream loses its own."""
    groups = await asyncio.to_thread(fleet.groups)
    for group in groups:
        os.kill(group.replica, signal.SIGKILL)
    return {pid for group in groups for pid in group.pids}


def hit_ingress(number: signal.Signals) -> Fault:
    """Signal one HTTP front."""

    async def fault(fleet: Fleet) -> set[int]:
        pid = (await asyncio.to_thread(fleet.ingresses))[0]
        os.kill(pid, number)
        return {pid}

    return fault


async def halt_ingress(fleet: Fleet) -> set[int]:
    """One HTTP front stops reading for a moment, then goes on."""
    pid = (await asyncio.to_thread(fleet.ingresses))[0]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(SHORT_STOP_S)
    os.kill(pid, signal.SIGCONT)
    return set()


async def kill_controller(fleet: Fleet) -> set[int]:
    """Serve's controller, which starts and watches replicas."""
    pid = await asyncio.to_thread(fleet.controller)
    os.kill(pid, signal.SIGKILL)
    return {pid}


async def kill_proxy(fleet: Fleet) -> set[int]:
    """Serve's HTTP proxy, which holds every client's connection."""
    pid = await asyncio.to_thread(fleet.proxy)
    os.kill(pid, signal.SIGKILL)
    return {pid}


ENGINE_FAULTS: dict[str, Fault] = {
    "rank 0 killed": hit_rank(0, signal.SIGKILL),
    "rank 1 killed": hit_rank(1, signal.SIGKILL),
    "engine replica killed": hit_replica(signal.SIGKILL),
    "rank 0 stopped": hit_rank(0, signal.SIGSTOP),
    "rank 1 stopped, its collective never returns": hit_rank(1, signal.SIGSTOP),
    "engine replica stopped": hit_replica(signal.SIGSTOP),
}
