"""What reuse does to the selection: overlap of what a reuse layer reads with the selection it would make itself.

Measured on audited steps, also while the guard has the layer select for itself: then of what it would have read. The
forced blocks count: they are in both selections, so of 16 blocks with one forced the overlap is 1/16 at the least.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.config import PAGE_SIZE
from engine.kernels.params import Selection
from engine.types import LayerOverlap


@dataclass(frozen=True, slots=True)
class PendingOverlap:
    """An overlap whose numbers are still on the device: reading them would wait for the step."""

    layer_id: int
    shared: Tensor  # int64 scalar, blocks in both selections
    count: Tensor  # int64 scalar, (token, index head) pairs
    topk: int

    def resolve(self) -> LayerOverlap | None:
        """The numbers; None when no token had a choice. Waits for the device."""
        count = int(self.count.item())
        return LayerOverlap(self.layer_id, self.shared.item() / self.topk, count) if count else None


class Audit:
    """Collects overlaps, per layer, until they are taken."""

    def __init__(self) -> None:
        self._pending: list[PendingOverlap] = []

    def record(self, layer_id: int, fresh: Selection, reused: Selection, positions: Tensor) -> None:
        """Add |fresh ∩ reused| / |fresh| of every (token, index head) that had more candidates than it could take.

        Tokens with at most topk candidates take them all: they say nothing.
        reused: what the layer attended with, or would have.  positions: int64 [num_tokens].
        """
        num_heads, _, topk = fresh.blocks.shape
        had_choice = positions // PAGE_SIZE >= topk
        in_both = (fresh.blocks.unsqueeze(-1) == reused.blocks.unsqueeze(-2)).any(-1)
        shared = (in_both & had_choice.view(1, -1, 1)).sum()
        self._pending.append(PendingOverlap(layer_id, shared, had_choice.sum() * num_heads, topk))

    def take(self) -> list[PendingOverlap]:
        """The overlaps since the last call."""
        pending, self._pending = self._pending, []
        return pending
