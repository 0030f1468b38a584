"""Tensor parallelism: which heads, columns and rows a rank holds, and the two collectives that the model needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.capacity import local_heads, split_error
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.probes import LayerProbe, Mark


@dataclass(slots=True)
class TensorParallel:
    """One rank of a group of `size`. With size 1 nothing is communicated.

    probe: set while a probed step is launched: the time of its collectives goes there.
    """

    rank: int = 0
    size: int = 1
    probe: LayerProbe | None = None

    def check(self, model: ModelConfig) -> None:
        """ConfigError when the model cannot be split evenly over the group."""
        if error := split_error(model, self.size):
            raise ConfigError(error)

    def part(self, total: int) -> slice:
        """This rank's share of `total` rows or columns, which the group splits evenly."""
        width = total // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def head_rows(self, num_heads: int, head_dim: int) -> slice:
        """Rows of this rank's heads. A group larger than num_heads replicates each head on neighbouring ranks."""
        if self.size <= num_heads:
            return self.part(num_heads * head_dim)
        head = self.rank * num_heads // self.size
        return slice(head * head_dim, (head + 1) * head_dim)

    def num_heads(self, num_heads: int) -> int:
        """How many of `num_heads` this rank holds."""
        return local_heads(num_heads, self.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            started = None if self.probe is None else self.probe.start()
            dist.all_reduce(x)
            self._stop(started)
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Concatenate over the ranks along the last dimension. x: [rows, width] -> [rows, size * width]."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        started = None if self.probe is None else self.probe.start()
        dist.all_gather(parts, x.contiguous())
        self._stop(started)
        return torch.cat(parts, dim=-1)

    def _stop(self, started: Mark | None) -> None:
        if self.probe is not None and started is not None:
            self.probe.stop_collective(started)
