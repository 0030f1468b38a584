"""Decode steps as captured graphs, one per index plan and batch size bucket.

A replay runs the whole step, from the tokens the last step left on the device to the sampled ones, without Python,
allocation or waiting: the host only copies one small input buffer. Rows beyond the batch are copies of its first row
that write no keys: they route to the same experts and read the same pages, so they cost next to nothing and need no
special case in any kernel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batches import SlotTables
from engine.capacity import decode_buckets
from engine.kernels.api import DecodeKernels
from engine.kernels.batch import Segment, StepBatch
from engine.model.minimax_m3 import MiniMaxM3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph and what it leaves behind.

    logits: [bucket, vocab / ranks], of this rank's share, valid until the next replay of any graph.
    computed, reused: selections per layer that a replay makes and reads, as Python counted them while it was captured.
    """

    graph: torch.cuda.CUDAGraph
    logits: Tensor
    computed: dict[int, int]
    reused: dict[int, int]


class DecodeGraphs:
    """The captured decode steps of one rank. Captures all buckets when made, the largest first.

    plans: letters of the index plans by which steps may be replayed; the model is left with the first.
    tokens: int64 [max_num_seqs], what the last replay sampled.
    """

    def __init__(
        self,
        model: MiniMaxM3,
        kernels: DecodeKernels,
        tables: SlotTables,
        max_model_len: int,
        plans: Sequence[str],
    ) -> None:
        self._model, self._kernels, self._tables = model, kernels, tables
        self._share = model.parallel.vocab_share(model.config.vocab_size)
        self._max_model_len = max_model_len
        max_num_seqs, max_pages = tables.block_tables.shape
        device = tables.device

        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._max_num_seqs = max_num_seqs
        self._inputs = buffer(1 + 4 * max_num_seqs)
        self._token_ids, self._positions, self._slot_mapping, self._slots, self._keys = buffer(5, max_num_seqs).unbind()
        self._temperatures = buffer(max_num_seqs, dtype=torch.float32)
        self._seq_lens = buffer(max_num_seqs, dtype=torch.int32)
        self._block_table = buffer(max_num_seqs, max_pages, dtype=torch.int32)
        self._row_ids = torch.arange(max_num_seqs, device=device)
        self._query_start_loc = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.tokens = buffer(max_num_seqs)
        self._buckets = decode_buckets(max_num_seqs)
        self._captured = self._capture_all(plans)

    def _capture_all(self, plans: Sequence[str]) -> dict[str, dict[int, _Captured]]:
        captured: dict[str, dict[int, _Captured]] = {}
        pool = None
        for plan in reversed(plans):
            started = time.perf_counter()
            if plan != self._model.active_plan:
                self._model.set_plan(plan)
            captured[plan] = {}
            for bucket in reversed(self._buckets):
                self._step(bucket)  # compiles what is not compiled; inputs of zero rows write no keys
                torch.cuda.synchronize()
                self._model.index_cache.take_counts()
                graph = torch.cuda.CUDAGraph()
                # Other threads (a NCCL watchdog) may call what a capture forbids.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    logits = self._step(bucket)
                pool = pool or graph.pool()
                captured[plan][bucket] = _Captured(graph, logits, *self._model.index_cache.take_counts())
            seconds = time.perf_counter() - started
            log.info("captured decode graphs for batches %s, plan %s, in %.1f s", self._buckets, plan, seconds)
        return captured

    @property
    def has_plan(self) -> bool:
        """Whether steps by the model's active plan were captured."""
        return self._model.active_plan in self._captured

    def _step(self, bucket: int) -> Tensor:
        """Everything that a replay does. Returns the logits."""
        tables, kernels = self._tables, self._kernels
        batch = StepBatch(
            positions=self._positions[:bucket],
            slot_mapping=self._slot_mapping[:bucket],
            row_ids=self._row_ids[:bucket],
            block_table=self._block_table[:bucket],
            seq_lens=self._seq_lens[:bucket],
            query_start_loc=self._query_start_loc[: bucket + 1],
            query_starts=list(range(bucket + 1)),
            seq_lens_host=[self._max_model_len] * bucket,
            segments=(Segment("decode", 0, bucket, 0, bucket),),
        )
        token_ids, slots = self._token_ids[:bucket], self._slots[:bucket]
        keys, temperatures = self._keys[:bucket], self._temperatures[:bucket]
        kernels.prepare(
            self._inputs, self._max_num_seqs, tables.last_tokens, tables.block_tables, batch,
            token_ids, slots, keys, temperatures,
        )  # fmt: skip
        logits = self._model.logits_share(self._model.forward(token_ids, batch))
        kernels.sample(logits, temperatures, keys, self.tokens[:bucket], tables.last_tokens, slots, self._share)
        return logits

    def replay(
        self, slots: list[int], positions: list[int], temperatures: list[float], keys: list[int]
    ) -> tuple[Tensor, dict[int, int], dict[int, int]]:
        """Run one decode step of len(slots) rows by the model's active plan; `tokens` then has what was sampled, as
        will tables.last_tokens.

        positions: of each row's newest known token.  temperatures, keys: of the noise; 0 is greedy.
        Returns the logits [num_rows, vocab / ranks], valid until the next replay, and the selections computed and
        reused per layer.
        """
        num_rows, width = len(slots), self._max_num_seqs
        of_plan = self._captured[self._model.active_plan]
        captured = of_plan[next(size for size in self._buckets if size >= num_rows)]
        inputs = np.zeros(1 + 4 * width, dtype=np.int64)
        inputs[0] = num_rows
        sections = inputs[1:].reshape(4, width)
        sections[0, :num_rows] = slots
        sections[1, :num_rows] = positions
        sections[2, :num_rows] = keys
        sections[3].view(np.float64)[:num_rows] = temperatures
        self._inputs.copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.logits[:num_rows], captured.computed, captured.reused
