"""The faults: each strikes processes that the fleet reports."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

from tests.faults.fleet import Fleet

# Strikes, and returns the processes that must be gone in the end.
Blow = Callable[[], Awaitable[set[int]]]
# Finds what to strike, before the streams begin: looking for it takes long enough for short ones to end.
Fault = Callable[[Fleet], Blow]

# An ingress that stands still for less than it takes Serve to give it up.
SHORT_STOP_S = 2.0


def _signalled(number: signal.Signals, struck: set[int], lost: set[int]) -> Blow:
    async def blow() -> set[int]:
        for pid in struck:
            os.kill(pid, number)
        return lost

    return blow


def hit_rank(rank: int, number: signal.Signals) -> Fault:
    """Signal one rank of one engine replica: the whole group must go."""

    def fault(fleet: Fleet) -> Blow:
        group = fleet.groups()[0]
        return _signalled(number, {group.workers[rank]}, group.pids)

    return fault


def hit_replica(number: signal.Signals) -> Fault:
    """Signal the process of one engine replica, the one that owns the workers."""

    def fault(fleet: Fleet) -> Blow:
        group = fleet.groups()[0]
        return _signalled(number, {group.replica}, group.pids)

    return fault


def kill_every_replica(fleet: Fleet) -> Blow:
    """All engines at once: every stream loses its own."""
    groups = fleet.groups()
    lost = {pid for group in groups for pid in group.pids}
    return _signalled(signal.SIGKILL, {group.replica for group in groups}, lost)


def hit_ingress(number: signal.Signals) -> Fault:
    """Signal one HTTP front."""

    def fault(fleet: Fleet) -> Blow:
        pid = fleet.ingresses()[0]
        return _signalled(number, {pid}, {pid})

    return fault


def halt_ingress(fleet: Fleet) -> Blow:
    """One HTTP front stops reading for a moment, then goes on."""
    pid = fleet.ingresses()[0]

    async def blow() -> set[int]:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(SHORT_STOP_S)
        os.kill(pid, signal.SIGCONT)
        return set()

    return blow


def kill_controller(fleet: Fleet) -> Blow:
    """Serve's controller, which starts and watches replicas."""
    pid = fleet.controller()
    return _signalled(signal.SIGKILL, {pid}, {pid})


def kill_proxy(fleet: Fleet) -> Blow:
    """Serve's HTTP proxy, which holds every client's connection."""
    pid = fleet.proxy()
    return _signalled(signal.SIGKILL, {pid}, {pid})


ENGINE_FAULTS: dict[str, Fault] = {
    "rank 0 killed": hit_rank(0, signal.SIGKILL),
    "rank 1 killed": hit_rank(1, signal.SIGKILL),
    "engine replica killed": hit_replica(signal.SIGKILL),
    "rank 0 stopped": hit_rank(0, signal.SIGSTOP),
    "rank 1 stopped, its collective never returns": hit_rank(1, signal.SIGSTOP),
    "engine replica stopped": hit_replica(signal.SIGSTOP),
}
