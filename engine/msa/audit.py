"""What reuse did to the selection: overlap of a reuse layer's selection with the one it would have made itself."""

from __future__ import annotations

from engine.msa.cache import Selection
from engine.types import LayerOverlap


class Audit:
    """Collects overlaps, per layer, until they are taken."""

    def __init__(self) -> None:
        self._overlaps: list[LayerOverlap] = []

    def record(self, layer_id: int, fresh: Selection, reused: Selection) -> None:
        """Add |fresh ∩ reused| / |fresh| of every (token, index head) that had more candidates than it could take.

        Tokens that take every block (at most topk candidates) overlap whatever the layers do: they say nothing.
        """
        topk = fresh.blocks.shape[-1]
        # Ascending ids: a full selection that ends at topk - 1 is {0 ... topk - 1}, all there was.
        chosen = (fresh.num_blocks == topk) & (fresh.blocks[:, :, -1] >= topk).any(0)
        kept, other = fresh.blocks[:, chosen], reused.blocks[:, chosen]
        shared = (kept.unsqueeze(-1) == other.unsqueeze(-2)).any(-1).sum().item()
        count = kept.shape[0] * kept.shape[1]
        if count:
            self._overlaps.append(LayerOverlap(layer_id, shared / topk, count))

    def take(self) -> list[LayerOverlap]:
        """The overlaps since the last call."""
        overlaps, self._overlaps = self._overlaps, []
        return overlaps
