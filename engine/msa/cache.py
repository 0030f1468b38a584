"""One step's selection, shared by the sparse layers of one model on one rank.

The buffers are fixed and the layers run in order, so a reuse layer reads what its source wrote a moment ago in the
same step: there is no key and no miss. IndexPlan proved at load that every reuse layer has a source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from engine.kernels.batch import StepBatch
from engine.kernels.params import BlockUnions, Selection
from engine.msa.plan import IndexPlan, Role

Observer = Callable[[int, StepBatch, Selection], None]


class IndexCache:
    """Fixed buffers for one Selection, and a second one for the audit's shadow selections.

    `plan` is that by which the next step runs.
    `observer`, when set, sees every layer's final selection (eager runs only).
    `computed` and `reused` count, per layer, how often the layer selected afresh or read its source's selection.
    """

    def __init__(
        self,
        plan: IndexPlan,
        *,
        num_index_heads: int,
        max_num_tokens: int,
        max_num_rows: int,
        topk_blocks: int,
        device: torch.device,
        group_tokens: int = 0,
        audited: bool = False,
    ) -> None:
        """max_num_tokens, max_num_rows: of a step.  group_tokens: see BlockUnions; 0: the backend makes none."""

        def buffers(unions: BlockUnions | None) -> Selection:
            blocks = torch.full((num_index_heads, max_num_tokens, topk_blocks), -1, dtype=torch.int32, device=device)
            return Selection(blocks, torch.zeros(max_num_tokens, dtype=torch.int32, device=device), unions)

        unions = None
        if group_tokens:
            max_groups = max_num_tokens // group_tokens + max_num_rows
            shape = (num_index_heads, max_groups, group_tokens * topk_blocks)
            entries = torch.zeros(shape, dtype=torch.int32, device=device)
            unions = BlockUnions(group_tokens, entries, torch.zeros(shape[:2], dtype=torch.int32, device=device))
        self.plan = plan
        self._selection = buffers(unions)
        # A shadow selection is compared, not attended with.
        self._shadow = buffers(None) if audited and plan.layers(Role.REUSE) else None
        self._written_by = -1
        self.observer: Observer | None = None
        self.computed: Counter[int] = Counter()
        self.reused: Counter[int] = Counter()

    def begin_step(self) -> None:
        """Forget who wrote last: a layer that read before its source wrote would trip the assertion in `current`."""
        self._written_by = -1

    def output(self, layer_id: int, num_tokens: int) -> Selection:
        """The buffers that compute layer `layer_id` must fill for this step's tokens."""
        self._written_by = layer_id
        self.computed[layer_id] += 1
        return self._selection.first(num_tokens)

    def current(self, layer_id: int, num_tokens: int) -> Selection:
        """The selection that reuse layer `layer_id` attends with, as its source left it."""
        assert self._written_by == self.plan.source(layer_id), "layers ran out of order"
        self.reused[layer_id] += 1
        return self._selection.first(num_tokens)

    def shadow(self, num_tokens: int) -> Selection:
        """Scratch of the same shape for the other selection that an audit compares with, without unions."""
        assert self._shadow is not None, "shadow selections exist in audited mode only"
        return self._shadow.first(num_tokens)

    def observe(self, layer_id: int, batch: StepBatch, selection: Selection) -> None:
        if self.observer is not None:
            self.observer(layer_id, batch, selection)

    def take_counts(self) -> tuple[dict[int, int], dict[int, int]]:
        """(computed, reused) per layer since the last call."""
        counts = dict(self.computed), dict(self.reused)
        self.computed.clear()
        self.reused.clear()
        return counts
