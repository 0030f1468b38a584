# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Which key blocks neighbouring prefill tokens select together: the lists that block-sparse prefill walks.

Four neighbours of a real model pick about 22 distinct blocks of 64, so a program that attends for all four loads a
third of what they would load one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.batch import Segment, StepBatch
from engine.kernels.configs import BLOCK_UNIONS, BLOCK_UNIONS_WIDE, SPARSE_GROUP_ROWS
from engine.kernels.launch import Target
from engine.kernels.params import BlockUnions, Selection

# Bits 24..31 of an entry: one per token of the group.
_MAX_TOKENS = 8


def group_tokens(target: Target, heads_per_group: int) -> int:
    """Neighbouring tokens that attend together, where `heads_per_group` query heads read one KV head: enough to fill
    the rows of a matrix instruction."""
    tokens: int = SPARSE_GROUP_ROWS[target.arch] // triton.next_power_of_2(heads_per_group)
    return max(1, min(_MAX_TOKENS, tokens))


def group_range(unions: BlockUnions, batch: StepBatch, segment: Segment) -> tuple[int, int]:
    """First index, and how many indices, of the segment's groups; a few of them may belong to no row."""
    first = segment.token_start // unions.group_tokens + segment.row_start
    # Rows that end inside a group leave at most one index free before the next row's first.
    return first, segment.token_end // unions.group_tokens + segment.row_end - first


def build_unions(target: Target, selection: Selection, batch: StepBatch, segment: Segment) -> None:
    """Fill `selection.unions` (see there) for the rows of a prefill segment, from `selection.blocks`."""
    unions, blocks = selection.unions, selection.blocks
    assert unions is not None
    num_heads, _, topk = blocks.shape
    first, count = group_range(unions, batch, segment)
    size = max(16, triton.next_power_of_2(unions.group_tokens * topk))
    target.launch(
        _build_kernel,
        (count, num_heads),
        blocks,
        batch.query_start_loc,
        unions.entries,
        unions.num_entries,
        segment.row_start,
        segment.row_end,
        first,
        blocks.stride(0),
        unions.num_entries.shape[1],
        config=(BLOCK_UNIONS if size <= 64 else BLOCK_UNIONS_WIDE)[target.arch],
        TOKENS=unions.group_tokens,
        TOPK=topk,
        SIZE=size,
    )


@triton.jit
def locate_group(query_starts, group, row_start, row_end, TOKENS: tl.constexpr):
    """The row of a group, the group's first token, and the token behind the row's last. First token past the last:
    the index belongs to no group."""
    low = row_start
    high = row_end
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(query_starts + middle) // TOKENS + middle <= group
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(query_starts + low)
    end = tl.load(query_starts + low + 1)
    return low, start + (group - start // TOKENS - low) * TOKENS, end


@triton.jit
def _load_ids(blocks, first, end, slot, TOKENS: tl.constexpr, TOPK: tl.constexpr):
    """Block id in each slot of [TOKENS x TOPK], -1 where there is none, and the slot's token bit."""
    token = slot // TOPK
    valid = (token < TOKENS) & (first + token < end)
    ids = tl.load(blocks + (first + token) * TOPK + slot % TOPK, mask=valid, other=-1)
    return ids, (1 << (24 + (token & 7)))


@triton.jit(do_not_specialize=["row_start", "row_end", "first_group"])
def _build_kernel(
    blocks,
    query_starts,
    entries,
    num_entries,
    row_start,
    row_end,
    first_group,
    head_stride,
    max_groups,
    TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One group: each id's place is the number of distinct smaller ids. Comparing all pairs needs neither a sort nor
    a scan, and a group's ids fit in one tile."""
    group = first_group + tl.program_id(0)
    head = tl.program_id(1)
    _, first, end = locate_group(query_starts, group, row_start, row_end, TOKENS)
    if first >= end:
        return
    slot_i = tl.arange(0, SIZE)
    ids_i, _ = _load_ids(blocks + head * head_stride, first, end, slot_i, TOKENS, TOPK)
    slot_j = tl.arange(0, SIZE)
    ids_j, bits_j = _load_ids(blocks + head * head_stride, first, end, slot_j, TOKENS, TOPK)
    same = ids_i[:, None] == ids_j[None, :]
    earlier = slot_j[None, :] < slot_i[:, None]
    # A token selects a block once, so that the sum of its bits is their union.
    mask = tl.sum(tl.where(same, bits_j[None, :], 0), axis=1)
    leads_i = (tl.max((same & earlier).to(tl.int32), axis=1) == 0) & (ids_i >= 0)
    leads_j = (tl.max((same & (slot_i[:, None] < slot_j[None, :])).to(tl.int32), axis=0) == 0) & (ids_j >= 0)
    smaller = (ids_j[None, :] < ids_i[:, None]) & leads_j[None, :]
    place = tl.sum(smaller.to(tl.int32), axis=1)
    list_index = head * max_groups + group
    tl.store(entries + list_index * (TOKENS * TOPK) + place, ids_i | mask, mask=leads_i)
    tl.store(num_entries + list_index, tl.sum(leads_i.to(tl.int32), axis=0))
