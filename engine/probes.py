"""Where a step spends its time, measured where it happens.

On CPU operations run when they are called, and a clock around them is right. On a GPU a call only queues: events in
the stream mark the times, and are read when the step's result is collected, after the device has passed them.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch

from engine.kernels.batch import Phase
from engine.types import LayerSeconds

# About a GPU's clock; it only has to be near.
_CLOCK_HZ = 1.8e9


class Mark(Protocol):
    """A point in the device's order of work."""

    def wait(self) -> None:
        """Until the device has come to this point."""

    def reached(self) -> bool:
        """Whether it has."""

    def seconds_since(self, earlier: Mark) -> float:
        """Time between two points that were reached."""


class HostMark:
    """On CPU the point is now."""

    def __init__(self) -> None:
        self._time_s = time.perf_counter()

    def wait(self) -> None:
        """It was reached when it was made."""

    def reached(self) -> bool:
        return True

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self._time_s - earlier._time_s


class DeviceMark:
    """An event in the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def reached(self) -> bool:
        return bool(self._event.query())

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, DeviceMark)
        return float(earlier._event.elapsed_time(self._event)) * 1e-3


def mark(device: torch.device) -> Mark:
    """Mark this point in the order of `device`."""
    return HostMark() if device.type == "cpu" else DeviceMark()


def hold(device: torch.device, seconds: float) -> None:
    """Keep a GPU busy for about so long, while the host queues what comes after.

    Then the operations of a probed step run back to back, as they do in a captured one, and the marks around them
    measure them and not the host's launches.
    """
    if device.type != "cpu":
        torch.cuda._sleep(int(seconds * _CLOCK_HZ))


class LayerProbe:
    """Times of single operations of one step, and of its collectives."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, int, Phase, Mark, Mark]] = []
        self._collectives: list[tuple[Mark, Mark]] = []

    def start(self) -> Mark:
        return mark(self._device)

    def stop(self, started: object, op: str, layer_id: int, phase: Phase) -> None:
        assert isinstance(started, HostMark | DeviceMark)
        self._spans.append((op, layer_id, phase, started, mark(self._device)))

    def stop_collective(self, started: Mark) -> None:
        """A collective that began at `started` is done."""
        self._collectives.append((started, mark(self._device)))

    def read_collectives(self) -> float:
        """Seconds in collectives; call it once the step is done."""
        return sum(stopped.seconds_since(started) for started, stopped in self._collectives)

    def read(self) -> list[LayerSeconds]:
        """The times; call it once the step is done."""
        return [
            LayerSeconds(op, layer_id, phase, stopped.seconds_since(started))
            for op, layer_id, phase, started, stopped in self._spans
        ]
