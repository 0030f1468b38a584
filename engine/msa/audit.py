"""What reuse did to the selection: overlap of a reuse layer's selection with the one it would have made itself."""

from __future__ import annotations

from torch import Tensor

from engine.config import PAGE_SIZE
from engine.msa.cache import Selection
from engine.types import LayerOverlap


class Audit:
    """Collects overlaps, per layer, until they are taken."""

    def __init__(self) -> None:
        self._overlaps: list[LayerOverlap] = []

    def record(self, layer_id: int, fresh: Selection, reused: Selection, positions: Tensor) -> None:
        """Add |fresh ∩ reused| / |fresh| of every (token, index head) that had more candidates than it could take.

        positions: int64 [num_tokens]. Tokens with at most topk candidates take them all: they say nothing.
        """
        topk = fresh.blocks.shape[-1]
        chosen = positions // PAGE_SIZE >= topk
        kept, other = fresh.blocks[:, chosen], reused.blocks[:, chosen]
        shared = (kept.unsqueeze(-1) == other.unsqueeze(-2)).any(-1).sum().item()
        count = kept.shape[0] * kept.shape[1]
        if count:
            self._overlaps.append(LayerOverlap(layer_id, shared / topk, count))

    def take(self) -> list[LayerOverlap]:
        """The overlaps since the last call."""
        overlaps, self._overlaps = self._overlaps, []
        return overlaps
