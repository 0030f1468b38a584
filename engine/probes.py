"""Where a probed step spends its time, per layer, measured where it happens."""

from __future__ import annotations

import time

from engine.kernels.batch import Phase
from engine.types import LayerSeconds


class HostProbe:
    """Wall-clock times of operations that run synchronously, as they do on CPU."""

    def __init__(self) -> None:
        self._seconds: list[LayerSeconds] = []

    def start(self) -> float:
        return time.perf_counter()

    def stop(self, started: object, op: str, layer_id: int, phase: Phase) -> None:
        assert isinstance(started, float)
        self._seconds.append(LayerSeconds(op, layer_id, phase, time.perf_counter() - started))

    def take(self) -> list[LayerSeconds]:
        """The times since the last call."""
        seconds, self._seconds = self._seconds, []
        return seconds
