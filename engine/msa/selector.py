"""Who gives a sparse layer its selection. A layer states its role by the selector it holds, not by a branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from engine.kernels.api import KernelSet, KVPages, Selection, SelectParams
from engine.kernels.batch import StepBatch
from engine.msa.audit import Audit
from engine.msa.cache import IndexCache


class Selector(Protocol):
    """owns_index: the layer has index weights, index columns in its projection and index-K pages."""

    owns_index: bool

    def __call__(self, index_q: Tensor | None, pages: KVPages, batch: StepBatch) -> Selection: ...


class ComputeSelector:
    """An F layer: scores the key blocks and writes the shared selection."""

    owns_index = True

    def __init__(self, layer_id: int, cache: IndexCache, kernels: KernelSet, params: SelectParams) -> None:
        self.layer_id = layer_id
        self.cache = cache
        self.kernels = kernels
        self.params = params

    def __call__(self, index_q: Tensor | None, pages: KVPages, batch: StepBatch) -> Selection:
        selection = self.cache.output(self.layer_id, batch.num_tokens)
        self.select(index_q, pages, batch, selection)
        self.cache.observe(self.layer_id, batch, selection)
        return selection

    def select(self, index_q: Tensor | None, pages: KVPages, batch: StepBatch, out: Selection) -> None:
        """Fill `out`, segment by segment; timed on probed steps."""
        assert index_q is not None and pages.index_k is not None
        for segment in batch.segments:
            started = batch.probe.start() if batch.probe is not None else None
            self.kernels.select_blocks(index_q, pages, batch, segment, self.params, out)
            if batch.probe is not None:
                batch.probe.stop(started, "indexer", self.layer_id, segment.phase)


class ReuseSelector:
    """A lean S layer: no parameters, no columns, no pages; reads what its source selected."""

    owns_index = False

    def __init__(self, layer_id: int, cache: IndexCache) -> None:
        self.layer_id = layer_id
        self.cache = cache

    def __call__(self, index_q: Tensor | None, pages: KVPages, batch: StepBatch) -> Selection:
        selection = self.cache.current(self.layer_id, batch.num_tokens)
        self.cache.observe(self.layer_id, batch, selection)
        return selection


class SourceSelector(ComputeSelector):
    """An F layer of an audited model: on audited steps it leaves a copy of its selection to the layers that the plan
    has reuse it, for when those select for themselves."""

    def __call__(self, index_q: Tensor | None, pages: KVPages, batch: StepBatch) -> Selection:
        selection = super().__call__(index_q, pages, batch)
        if batch.audit:
            self.cache.shadow(batch.num_tokens).blocks.copy_(selection.blocks)
        return selection


class ComparedSelector(ComputeSelector):
    """An S layer that selects for itself, since the plan was set aside: on audited steps it measures how far reuse
    would have been from that. Its source, and every sparse layer between them, must select too."""

    def __init__(
        self, layer_id: int, cache: IndexCache, kernels: KernelSet, params: SelectParams, audit: Audit
    ) -> None:
        super().__init__(layer_id, cache, kernels, params)
        self.audit = audit

    def __call__(self, index_q: Tensor | None, pages: KVPages, batch: StepBatch) -> Selection:
        fresh = super().__call__(index_q, pages, batch)
        if batch.audit:
            self.audit.record(self.layer_id, fresh, self.cache.shadow(batch.num_tokens), batch.positions)
        return fresh


class AuditedSelector:
    """An S layer that keeps its indexer: reads like a ReuseSelector, and on audited steps measures the difference."""

    owns_index = True

    def __init__(
        self, layer_id: int, cache: IndexCache, kernels: KernelSet, params: SelectParams, audit: Audit
    ) -> None:
        self.reuse = ReuseSelector(layer_id, cache)
        self.fresh = ComputeSelector(layer_id, cache, kernels, params)
        self.audit = audit

    def __call__(self, index_q: Tensor | None, pages: KVPages, batch: StepBatch) -> Selection:
        reused = self.reuse(index_q, pages, batch)
        if batch.audit:
            fresh = self.fresh.cache.shadow(batch.num_tokens)
            # The shadow's time is not the layer's own: it would show as indexer time of a layer that reuses.
            self.fresh.select(index_q, pages, unprobed(batch), fresh)
            self.audit.record(self.fresh.layer_id, fresh, reused, batch.positions)
        return reused


def unprobed(batch: StepBatch) -> StepBatch:
    """The same batch without its probe."""
    return batch if batch.probe is None else replace(batch, probe=None)
