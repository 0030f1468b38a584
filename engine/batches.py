"""StepPlan -> tensors: what a rank keeps per slot on its device, and the batch of one step.

Block tables and the last sampled tokens live on the device. A plan brings only what is new, and a decode row reads
the token that the step before it sampled without the host ever seeing it: that is what lets steps overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.kernels.batch import Probe, Segment, StepBatch
from engine.transfer import to_device
from engine.types import SamplingParams, StepPlan


@dataclass(slots=True)
class Resident:
    """What the host keeps of a running request: the tokens it came with, and its pages in order."""

    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    page_ids: list[int]


class SlotTables:
    """Per slot, on the device.

    block_tables: int32 [max_num_seqs, max_pages], logical block -> page id.
    last_tokens: int64 [max_num_seqs], the newest token, whose keys are not computed yet.
    """

    def __init__(self, max_num_seqs: int, max_pages: int, device: torch.device) -> None:
        self.device = device
        self.block_tables = torch.zeros(max_num_seqs, max_pages, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def update(self, plan: StepPlan, residents: list[Resident | None]) -> None:
        """Take in the new requests and pages of `plan`, in the residents too."""
        if plan.new:
            slots = to_device([new.slot for new in plan.new], torch.int64, self.device)
            tokens = to_device([new.token_ids[-1] for new in plan.new], torch.int64, self.device)
            self.last_tokens.index_copy_(0, slots, tokens)
        cells: list[tuple[int, int, int]] = []
        for row in plan.rows:
            if row.new_page_ids:
                resident = residents[row.slot]
                assert resident is not None, f"slot {row.slot} is empty"
                first = len(resident.page_ids)
                cells += [(row.slot, first + i, page_id) for i, page_id in enumerate(row.new_page_ids)]
                resident.page_ids += row.new_page_ids
        if cells:
            slot, index, page_id = to_device(np.array(cells).T.copy(), torch.int64, self.device).unbind()
            self.block_tables[slot, index] = page_id.int()

    def keep(self, slots: list[int], tokens: Tensor) -> None:
        """The newest tokens of slots, int64 [len(slots)]."""
        where = to_device(slots, torch.int64, self.device)
        # A row that is not finite ends; what may still run of it must not index past the vocabulary.
        self.last_tokens.index_copy_(0, where, tokens.clamp(min=0))

    def batch(
        self, plan: StepPlan, residents: list[Resident | None], probe: Probe | None
    ) -> tuple[Tensor, StepBatch, list[int]]:
        """(token ids int64 [num_tokens], the step's tensors, the row's slots). `update` comes first."""
        rows, device = plan.rows, self.device
        token_ids: list[int] = []
        for row in rows:
            resident = residents[row.slot]
            assert resident is not None, f"slot {row.slot} is empty"
            if len(token_ids) < plan.num_decode_rows:  # decode rows come first, one token each
                token_ids.append(0)
                continue
            start = row.num_computed_tokens
            token_ids += resident.token_ids[start : start + row.num_scheduled_tokens]
        counts = np.array([row.num_scheduled_tokens for row in rows])
        computed = np.array([row.num_computed_tokens for row in rows])
        starts = [0, *accumulate(row.num_scheduled_tokens for row in rows)]
        num_tokens, num_rows = starts[-1], len(rows)
        assert len(token_ids) == num_tokens, "the plan schedules tokens that this rank does not know"
        row_ids = np.repeat(np.arange(num_rows), counts)
        positions = np.arange(num_tokens) - np.repeat(np.array(starts[:-1]) - computed, counts)
        seq_lens = computed + counts
        slots = [row.slot for row in rows]
        packed = to_device(
            np.concatenate((token_ids, row_ids, positions, seq_lens, starts, slots)), torch.int64, device
        )
        sizes = (num_tokens, num_tokens, num_tokens, num_rows, num_rows + 1, num_rows)
        tokens_d, row_ids_d, positions_d, seq_lens_d, starts_d, slots_d = packed.split(sizes)
        if plan.num_decode_rows:
            decode = slots_d[: plan.num_decode_rows]
            tokens_d[: plan.num_decode_rows] = self.last_tokens.index_select(0, decode)
        # On a GPU the whole table, whose width kernels are compiled for and split their work by: a step of any length
        # finds them compiled, and gives what a captured one gives.
        width = self.block_tables.shape[1] if device.type != "cpu" else -(-int(seq_lens.max()) // PAGE_SIZE)
        table = self.block_tables.index_select(0, slots_d)[:, :width].contiguous()
        pages = table.view(-1).index_select(0, row_ids_d * width + positions_d // PAGE_SIZE).long()
        batch = StepBatch(
            positions=positions_d,
            slot_mapping=pages * PAGE_SIZE + positions_d % PAGE_SIZE,
            row_ids=row_ids_d,
            block_table=table,
            seq_lens=seq_lens_d.int(),
            query_start_loc=starts_d.int(),
            query_starts=starts,
            seq_lens_host=seq_lens.tolist(),
            segments=_segments(plan, starts),
            probe=probe,
            audit=plan.audit,
        )
        return tokens_d, batch, slots


def _segments(plan: StepPlan, starts: list[int]) -> tuple[Segment, ...]:
    split, end = plan.num_decode_rows, len(plan.rows)
    segments = (
        Segment("decode", 0, split, 0, starts[split]),
        Segment("prefill", split, end, starts[split], starts[end]),
    )
    return tuple(segment for segment in segments if segment.num_rows)
