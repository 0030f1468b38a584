# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Selections as page tables: for attention kernels that read any list of small pages and know nothing of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.batch import Segment, StepBatch
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import Selection

PAGE = tl.constexpr(128)
_PAGE = 128
_CONFIG = LaunchConfig(num_warps=1, num_stages=1)


@triton.jit(
    do_not_specialize=["first_token"],
    do_not_specialize_on_alignment=["block_table_ptr", "row_ids_ptr", "positions_ptr"],
)
def _tables_kernel(
    blocks_ptr, block_table_ptr, row_ids_ptr, positions_ptr, tables_ptr, lengths_ptr, first_token,
    head_stride, token_stride, block_table_stride,
    TOPK: tl.constexpr, GROUPS: tl.constexpr, INDEX_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SPLIT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, GROUPS). See selected_pages."""
    token = first_token + tl.program_id(0)
    group = tl.program_id(1)
    position = tl.load(positions_ptr + token)
    row = tl.load(row_ids_ptr + token)
    column = tl.arange(0, PADDED * SPLIT)
    rank = column // SPLIT
    head = group * INDEX_HEADS // GROUPS
    block = tl.load(blocks_ptr + head * head_stride + token * token_stride + rank, mask=rank < TOPK, other=-1)
    is_valid = block >= 0
    page = tl.load(block_table_ptr + row * block_table_stride + block, mask=is_valid, other=0)
    small_page = (page * SPLIT + column % SPLIT) * KV_HEADS + group * KV_HEADS // GROUPS
    sequence = tl.program_id(0) * GROUPS + group
    tl.store(tables_ptr + sequence * (TOPK * SPLIT) + column, tl.where(is_valid, small_page, 0), mask=rank < TOPK)
    # Ascending ids: only the last block can be the token's own, of which it sees a part.
    num_blocks = tl.sum(is_valid.to(tl.int32)) // SPLIT
    own = (position // PAGE).to(tl.int32)
    hidden = tl.where(tl.max(block) == own, PAGE - 1 - (position % PAGE).to(tl.int32), 0)
    tl.store(lengths_ptr + sequence, num_blocks * PAGE - hidden)


def selected_pages(
    target: Target,
    selection: Selection,
    batch: StepBatch,
    segment: Segment,
    *,
    num_kv_heads: int,
    small_page: int,
) -> tuple[Tensor, Tensor]:
    """What the tokens of `segment` selected, as lists of pages of `small_page` keys of one KV head.

    A page of 128 keys is `128 / small_page` neighbouring small pages of each KV head: small page j of KV head h in
    page p has the id (p * (128 / small_page) + j) * num_kv_heads + h.

    Returns tables int32 [num_tokens * groups, topk_blocks * 128 / small_page], 0 to the right, and lengths int32
    [num_tokens * groups], how many of the listed keys are visible. groups: the larger one of the numbers of KV heads
    and index heads; tokens come first, groups second. All but the last listed block are visible in full.
    """
    blocks = selection.blocks
    index_heads, _, topk = blocks.shape
    groups, split = max(index_heads, num_kv_heads), _PAGE // small_page
    assert blocks.stride(2) == 1 and batch.block_table.stride(1) == 1
    tables = torch.empty(segment.num_tokens * groups, topk * split, dtype=torch.int32, device=blocks.device)
    lengths = torch.empty(segment.num_tokens * groups, dtype=torch.int32, device=blocks.device)
    target.launch(
        _tables_kernel,
        (segment.num_tokens, groups),
        blocks,
        batch.block_table,
        batch.row_ids,
        batch.positions,
        tables,
        lengths,
        segment.token_start,
        blocks.stride(0),
        blocks.stride(1),
        batch.block_table.stride(0),
        config=_CONFIG,
        TOPK=topk,
        GROUPS=groups,
        INDEX_HEADS=index_heads,
        KV_HEADS=num_kv_heads,
        SPLIT=split,
        PADDED=triton.next_power_of_2(topk),
    )
    return tables, lengths
