"""Tensor parallelism: which heads, columns and rows a rank holds, and the collectives that the model needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import collectives
from engine.capacity import local_heads, split_error
from engine.collectives import FewRows
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.kernels.api import KernelSet
from engine.kernels.exchange import VocabShare
from engine.probes import LayerProbe, Mark


@dataclass(slots=True)
class TensorParallel:
    """One rank of a group of `size`. With size 1 nothing is communicated.

    few_rows: what sums few rows; None: torch.distributed does.
    probe: set while a probed step is launched: the time of its collectives goes there.
    """

    rank: int = 0
    size: int = 1
    few_rows: FewRows | None = None
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

    def vocab_share(self, vocab_size: int) -> VocabShare | None:
        """This rank's share of the vocabulary; None where it has all of it."""
        if self.size == 1:
            return None
        exchange = None if self.few_rows is None else self.few_rows.sample
        return VocabShare(self.rank, self.size, self.part(vocab_size).start, self.all_gather, exchange)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks. x: [rows, size], which may be overwritten with it."""
        if self.size == 1:
            return x
        started = self._start()
        if self.few_rows is not None and self.few_rows.takes(x):
            x = self.few_rows.all_reduce(x)
        else:
            collectives.all_reduce(x)
        self._stop(started)
        return x

    def add_rms_norm(
        self, kernels: KernelSet, x: Tensor, residual: Tensor, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`kernels.add_rms_norm` of the sum of x [rows, size] over the ranks, which x may be overwritten with.

        The norm may differ in its last bit between few rows, which one kernel sums and norms, and many.
        """
        if self.few_rows is None or not self.few_rows.takes(x):
            return kernels.add_rms_norm(self.all_reduce(x), residual, gain, eps)
        started = self._start()
        result = self.few_rows.add_rms_norm(x, residual, gain, eps)
        self._stop(started)
        return result

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] of each rank -> [size, ...]."""
        if self.size == 1:
            return x.unsqueeze(0)
        started = self._start()
        parts = collectives.all_gather(x)
        self._stop(started)
        return parts

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Concatenate over the ranks along the last dimension. x: [rows, width] -> [rows, size * width]."""
        return x if self.size == 1 else torch.cat(self.all_gather(x).unbind(), dim=-1)

    def _start(self) -> Mark | None:
        return None if self.probe is None else self.probe.start()

    def _stop(self, started: Mark | None) -> None:
        if self.probe is not None and started is not None:
            self.probe.stop_collective(started)
