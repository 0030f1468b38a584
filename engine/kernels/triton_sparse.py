# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Block-sparse prefill attention with shared loads: one program attends for a few neighbouring tokens over the union
of the blocks they selected, so that a page is read once for all of them (query-major union tiles, as in FlashInfer's
and vLLM's MiniMax sparse attention). A row of the tile whose token did not select the block gets weight zero.

Where neighbours have little in common most products are masked away, and it still pays: with random selections, 60 of
64 blocks distinct, a tile of four tokens took 1.12 ms per 8192 tokens on H100, four tiles of one token 1.3 to 1.8 ms.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.batch import Segment, StepBatch
from engine.kernels.configs import (
    SPARSE_UNION,
    SPARSE_UNION_FP8,
    SPARSE_UNION_FP32,
)
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import KVPages, Selection
from engine.kernels.triton_common import operand
from engine.kernels.triton_unions import build_unions, group_range, group_tokens, locate_group

__all__ = ["attend_sparse", "build_unions", "group_tokens"]

_LOG2_E = 1.4426950408889634
# Least rows of a matrix instruction.
_MIN_ROWS = 16


def attend_sparse(
    target: Target,
    q: Tensor,
    pages: KVPages,
    selection: Selection,
    batch: StepBatch,
    segment: Segment,
    scale: float,
    out: Tensor,
) -> None:
    """Causal attention over the selected key blocks, for the tokens of a prefill segment; see torch_attention.

    `selection.unions` must have been built for the segment.
    """
    unions = selection.unions
    assert unions is not None
    _, num_heads, dim = q.shape
    index_heads, _, topk = selection.blocks.shape
    kv_heads = pages.k.shape[1]
    groups = max(kv_heads, index_heads)
    heads = num_heads // groups
    first, count = group_range(unions, batch, segment)
    target.launch(
        _attend_kernel,
        (count * groups,),
        q,
        pages.k,
        pages.v,
        pages.k_scale,
        pages.v_scale,
        batch.block_table,
        batch.query_start_loc,
        batch.positions,
        unions.entries,
        unions.num_entries,
        out,
        scale * _LOG2_E,
        segment.row_start,
        segment.row_end,
        first,
        count,
        unions.num_entries.shape[1],
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        pages.k.stride(0),
        pages.k.stride(1),
        batch.block_table.stride(0),
        config=_config(target, q, pages),
        TOKENS=unions.group_tokens,
        TOPK=topk,
        HEADS=heads,
        HEADS_PAD=max(triton.next_power_of_2(heads), _MIN_ROWS // unions.group_tokens),
        GROUPS=groups,
        KV_SHARE=groups // kv_heads,
        INDEX_SHARE=groups // index_heads,
        DIM=dim,
        FP8=pages.k_scale is not None,
        NUM_XCD=8 if target.is_hip else 1,
        UPCAST=target.interpreted,
    )


def _config(target: Target, q: Tensor, pages: KVPages) -> LaunchConfig:
    if q.element_size() == 4:
        return SPARSE_UNION_FP32[target.arch]
    return (SPARSE_UNION if pages.k_scale is None else SPARSE_UNION_FP8)[target.arch]


@triton.jit
def _own_order(program, count, NUM_XCD: tl.constexpr):
    """Workgroup w runs on chiplet w % NUM_XCD: each chiplet gets a contiguous range, whose programs share its L2."""
    if NUM_XCD == 1:
        return program
    xcd = program % NUM_XCD
    return xcd * (count // NUM_XCD) + tl.minimum(xcd, count % NUM_XCD) + program // NUM_XCD


@triton.jit
def _attend_tile(
    acc,
    largest,
    total,
    q,
    k,
    v,
    k_scale,
    v_scale,
    bias,
    visible,
    scale,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of keys into the running softmax (base 2). bias: [rows], 0 or -1e30 for rows that do not take part;
    the running maximum starts far above that, so that such a row's weights vanish whatever it has seen before."""
    scores = tl.dot(q, tl.trans(operand(k.to(q.dtype), UPCAST)), input_precision="ieee")
    if FP8:
        scores *= k_scale[None, :]
    if MASKED:
        scores = tl.where(visible, scores, -1e30)
    peak = tl.maximum(largest, tl.max(scores, axis=1) * scale + bias)
    weights = tl.math.exp2(scores * scale + (bias - peak)[:, None])
    shrink = tl.math.exp2(largest - peak)
    total = total * shrink + tl.sum(weights, axis=1)
    if FP8:
        weights *= v_scale[None, :]
    acc = tl.dot(weights.to(q.dtype), operand(v.to(q.dtype), UPCAST), acc * shrink[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit
def _attend_list(
    q,
    bit,
    position,
    list_base,
    count,
    k_base,
    v_base,
    k_scale_base,
    v_scale_base,
    table,
    scale,
    page_stride,
    scale_stride,
    first_position,
    last_position,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    SUB: tl.constexpr,
    FP8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of a tile of rows over a list of `count` blocks, ascending. q: [ROWS, DIM]; bit: [ROWS], the bit of an
    entry that a row must find set; position: [ROWS]."""
    PARTS: tl.constexpr = 128 // SUB
    offsets = tl.arange(0, SUB)
    tile = offsets[:, None] * DIM + tl.arange(0, DIM)[None, :]
    acc = tl.zeros([ROWS, DIM], tl.float32)
    largest = tl.full([ROWS], -1e20, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    k_scale = tl.zeros([SUB], tl.float32)
    v_scale = k_scale

    # Only the tokens' own blocks, the last one or two of the list, need a causal mask.
    last = count - 1
    before_last = tl.load(list_base + tl.maximum(last - 1, 0)) & 0xFFFFFF
    last_block = tl.load(list_base + last) & 0xFFFFFF
    own = first_position // 128
    plain = last + (last_block < own).to(tl.int32) - ((last > 0) & (before_last >= own)).to(tl.int32)
    visible_keys = tl.minimum(last_position + 1 - last_block * 128, 128)
    begin = 0
    end = plain * PARTS
    # Each step looks up the page of the next one: the lookup's two dependent loads would otherwise delay its tiles.
    entry = tl.load(list_base)
    page = tl.load(table + (entry & 0xFFFFFF))
    for masked in tl.static_range(2):
        for step in tl.range(begin, end):
            next_entry = tl.load(list_base + tl.minimum((step + 1) // PARTS, last))
            next_page = tl.load(table + (next_entry & 0xFFFFFF))
            key = (step % PARTS) * SUB
            base = page.to(tl.int64) * page_stride + key * DIM
            scale_offset = page.to(tl.int64) * scale_stride + key
            keys = (entry & 0xFFFFFF) * 128 + key + offsets
            visible = keys[None, :] <= position[:, None]
            # Values that an earlier owner left must not get into the products, not even as NaN x 0.
            written = keys <= last_position
            k = tl.load(k_base + base + tile)
            if FP8:
                k_scale = tl.load(k_scale_base + scale_offset + offsets)
            if masked:
                v = tl.load(v_base + base + tile, mask=written[:, None], other=0.0)
                if FP8:
                    v_scale = tl.load(v_scale_base + scale_offset + offsets, mask=written, other=0.0)
            else:
                v = tl.load(v_base + base + tile)
                if FP8:
                    v_scale = tl.load(v_scale_base + scale_offset + offsets)
            bias = tl.where((entry >> bit) & 1 != 0, 0.0, -1e30)
            acc, largest, total = _attend_tile(
                acc, largest, total, q, k, v, k_scale, v_scale, bias, visible, scale, FP8, masked != 0, UPCAST
            )
            entry = next_entry
            page = next_page
        begin = end
        end = last * PARTS + (visible_keys + SUB - 1) // SUB
    # Rows beside the tokens have seen nothing.
    return acc / tl.maximum(total, 1e-20)[:, None]


@triton.jit(do_not_specialize=["row_start", "row_end", "first_group", "num_groups", "table_stride"])
def _attend_kernel(
    q_base,
    k_base,
    v_base,
    k_scale_base,
    v_scale_base,
    table,
    query_starts,
    positions,
    entries,
    num_entries,
    out_base,
    scale,
    row_start,
    row_end,
    first_group,
    num_groups,
    max_groups,
    q_stride,
    q_head_stride,
    out_stride,
    out_head_stride,
    page_stride,
    kv_head_stride,
    table_stride,
    TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    KV_SHARE: tl.constexpr,
    INDEX_SHARE: tl.constexpr,
    DIM: tl.constexpr,
    SUB: tl.constexpr,
    FP8: tl.constexpr,
    NUM_XCD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The query heads of one head group of the tokens of one group."""
    program = _own_order(tl.program_id(0), num_groups * GROUPS, NUM_XCD)
    group = first_group + program % num_groups
    head_group = program // num_groups
    row, first, end = locate_group(query_starts, group, row_start, row_end, TOKENS)
    if first >= end:
        return
    list_index = head_group // INDEX_SHARE * max_groups + group
    rows = tl.arange(0, TOKENS * HEADS_PAD)
    columns = tl.arange(0, DIM)[None, :]
    head = head_group * HEADS + rows % HEADS_PAD
    kv_head = head_group // KV_SHARE
    token = first + rows // HEADS_PAD
    valid = ((token < end) & (rows % HEADS_PAD < HEADS))[:, None]
    q = tl.load(q_base + (token * q_stride + head * q_head_stride)[:, None] + columns, mask=valid, other=0.0)
    first_position = tl.load(positions + first).to(tl.int32)
    result = _attend_list(
        operand(q, UPCAST),
        24 + rows // HEADS_PAD,
        first_position + rows // HEADS_PAD,
        entries + list_index * (TOKENS * TOPK),
        tl.load(num_entries + list_index),
        k_base + kv_head * kv_head_stride,
        v_base + kv_head * kv_head_stride,
        k_scale_base + kv_head * 128 if FP8 else k_scale_base,
        v_scale_base + kv_head * 128 if FP8 else v_scale_base,
        table + row * table_stride,
        scale,
        page_stride,
        (GROUPS // KV_SHARE) * 128,
        first_position,
        first_position + tl.minimum(TOKENS, end - first) - 1,
        TOKENS * HEADS_PAD,
        DIM,
        SUB,
        FP8,
        UPCAST,
    )
    place = (token * out_stride + head * out_head_stride)[:, None] + columns
    tl.store(out_base + place, result.to(out_base.dtype.element_ty), mask=valid)
