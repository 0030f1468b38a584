"""Paged attention of decode rows, one token each: over a selection of key blocks, or over the whole context.

One kernel for both: they differ in which blocks a row walks. Flash-decoding: several programs share a row's keys and
leave partial results, which a second kernel merges in the order of the splits. (A merge by the last program of a row
was twice as slow on H100, with one row: a single multiprocessor reads all partial results.) How many splits there are
depends on shapes only, so that a captured graph stays valid, and a row's result does not depend on its neighbours.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import KVPages, Selection
from engine.kernels.triton_common import follow, operand

PAGE = 128
LOG2_E = math.log2(math.e)


@triton.jit
def converted(x, DTYPE: tl.constexpr):
    """A tile of keys or values as an operand of dots in DTYPE."""
    if x.dtype == tl.float8e4b8:
        x = x.to(tl.float32)  # Triton 3.6 fails to compile e4m3fnuz to bf16
    return x.to(DTYPE)


@triton.jit(do_not_specialize=["first_token"])
def _merge_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    first_token,
    out_stride,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (tokens, heads). part: float32 [tokens, groups, SPLITS, PADDED, DIM]; lse: float32 [tokens, groups, PADDED,
    SPLITS]."""
    follow(OVERLAP)
    token, head = tl.program_id(0), tl.program_id(1)
    unit = token * (tl.num_programs(1) // HEADS) + head // HEADS
    dims = tl.arange(0, DIM)
    splits = tl.arange(0, STEP)
    parts = part_ptr + (unit * SPLITS * PADDED + head % HEADS) * DIM
    lses = lse_ptr + (unit * PADDED + head % HEADS) * SPLITS
    every = tl.load(lses + tl.arange(0, SPLITS))
    largest = tl.max(every, 0)
    # Unrolled and summed at the end: all loads are in flight at once.
    out = tl.zeros([STEP, DIM], tl.float32)
    for start in tl.static_range(0, SPLITS, STEP):
        weights = tl.exp2(tl.load(lses + start + splits) - largest)
        out += weights[:, None] * tl.load(parts + (start + splits)[:, None] * (PADDED * DIM) + dims[None, :])
    out = tl.sum(out, 0) / tl.sum(tl.exp2(every - largest), 0)
    tl.store(out_ptr + (first_token + token) * out_stride + head * DIM + dims, out.to(out_ptr.dtype.element_ty))


def merge(target: Target, part: Tensor, lse: Tensor, first_token: int, heads: int, out: Tensor) -> None:
    """Merge partial attention results into out[first_token:].

    part: float32 [tokens, groups, splits, padded, dim], normalised within the split; lse: float32 [tokens, groups,
    padded, splits], base 2, -inf where a split saw no key.  heads: of one group, <= padded.
    """
    num_tokens, groups, splits, padded, dim = part.shape
    table = configs.ATTENTION_MERGE if splits <= 32 else configs.ATTENTION_MERGE_MANY
    config = table[target.arch]
    target.launch(
        _merge_kernel,
        (num_tokens, groups * heads),
        part,
        lse,
        out,
        first_token,
        out.stride(0),
        config=config,
        HEADS=heads,
        PADDED=padded,
        DIM=dim,
        SPLITS=splits,
        STEP=min(splits, max(1, 2048 // dim)),
        OVERLAP=target.overlaps,
    )


@triton.jit(do_not_specialize=["table_stride", "blocks_stride"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    positions_ptr,
    blocks_ptr,
    num_blocks_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    q_stride,
    page_stride,
    table_stride,
    blocks_stride,
    out_stride,
    qk_scale,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
    TOPK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (rows, groups, SPLITS): the heads of one group of one row over its share of the keys, in units of BLOCK_N.

    TOPK: selected blocks per token, 0: all blocks.  page_stride: elements from page to page of k and of v.
    blocks_stride: from index head to index head.  qk_scale: the softmax scale times log2(e).
    """
    follow(OVERLAP)
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUPS: tl.constexpr = KV_HEADS if KV_HEADS > INDEX_HEADS else INDEX_HEADS
    UNITS: tl.constexpr = 128 // BLOCK_N
    DTYPE: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    kv_head = group * KV_HEADS // GROUPS
    table_ptr += row * table_stride
    position = tl.load(positions_ptr + row).to(tl.int32)
    if TOPK > 0:
        blocks_ptr += (group * INDEX_HEADS // GROUPS) * blocks_stride + row * TOPK
        num_units = tl.load(num_blocks_ptr + row) * UNITS
        # Shares by the shape: waiting for num_blocks before the first block id can be loaded costs more than it evens.
        share = (TOPK * UNITS + SPLITS - 1) // SPLITS
    else:
        num_units = position // BLOCK_N + 1
        share = (num_units + SPLITS - 1) // SPLITS

    heads, dims, keys = tl.arange(0, PADDED), tl.arange(0, DIM), tl.arange(0, BLOCK_N)
    q_tile = group * HEADS * DIM + heads[:, None] * DIM + dims[None, :]
    q = operand(tl.load(q_ptr + row * q_stride + q_tile, mask=heads[:, None] < HEADS, other=0.0), UPCAST)
    kv_tile = keys[:, None] * DIM + dims[None, :]

    # The running maximum is finite and hidden scores are -inf: no NaN, whatever is hidden.
    largest = tl.full([PADDED], -1e30, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, DIM], tl.float32)
    for unit in range(split * share, tl.minimum(split * share + share, num_units)):
        block = unit // UNITS
        if TOPK > 0:
            block = tl.load(blocks_ptr + block)
        offset = (unit % UNITS) * BLOCK_N
        page = tl.load(table_ptr + block).to(tl.int64)
        base = page * page_stride + (kv_head * 128 + offset) * DIM
        visible = block * 128 + offset + keys <= position
        k = tl.load(k_ptr + base + kv_tile)
        # What an earlier owner left must not get into the product, not even as NaN * 0.
        v = tl.load(v_ptr + base + kv_tile, mask=visible[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(converted(k, DTYPE)), input_precision="ieee")
        if k_scale_ptr is not None:
            scale_base = (page * KV_HEADS + kv_head) * 128 + offset
            scores *= tl.load(k_scale_ptr + scale_base + keys)[None, :]
        scores = tl.where(visible[None, :], scores * qk_scale, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new_largest[:, None])
        alpha = tl.exp2(largest - new_largest)
        total = total * alpha + tl.sum(p, 1)
        if v_scale_ptr is not None:
            p *= tl.load(v_scale_ptr + scale_base + keys, mask=visible, other=0.0)[None, :]
        acc = tl.dot(p.to(DTYPE), converted(v, DTYPE), acc * alpha[:, None], input_precision="ieee")
        largest = new_largest

    out_ptr += row * out_stride + group * HEADS * DIM
    tile = heads[:, None] * DIM + dims[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + tile, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=heads[:, None] < HEADS)
    else:
        pair = row * GROUPS + group
        part_ptr += pair * SPLITS * PADDED * DIM
        lse_ptr += pair * PADDED * SPLITS
        seen = tl.where(total > 0, total, 1.0)
        tl.store(part_ptr + split * PADDED * DIM + tile, acc / seen[:, None])
        lse = tl.where(total > 0, largest + tl.log2(seen), float("-inf"))
        tl.store(lse_ptr + heads * SPLITS + split, lse)


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
    """torch_attention.attend_sparse for a decode segment."""
    index_heads, _, topk = selection.blocks.shape
    programs = segment.num_rows * max(pages.k.shape[1], index_heads)
    rule = configs.SPARSE_DECODE_PROGRAMS
    if q.dtype == torch.float32:
        config = configs.DECODE_FLOAT32[target.arch]
    elif pages.k_scale is not None:
        config, rule = configs.SPARSE_DECODE_FP8[target.arch], configs.SPARSE_DECODE_FP8_PROGRAMS
    else:
        # With few rows even one block per program leaves units idle: smaller pieces, a shorter critical path.
        small = programs * topk < target.num_units
        config = (configs.SPARSE_DECODE_SMALL if small else configs.SPARSE_DECODE)[target.arch]
    splits = num_splits(target, programs, topk * PAGE // config["BLOCK_N"], rule)
    _attend(target, q, pages, selection, batch, segment, scale, out, config, splits)


def attend_dense(
    target: Target, q: Tensor, pages: KVPages, batch: StepBatch, segment: Segment, scale: float, out: Tensor
) -> None:
    """torch_attention.attend_dense for a decode segment."""
    if q.dtype == torch.float32:
        config = configs.DECODE_FLOAT32[target.arch]
    else:
        config = (configs.DENSE_DECODE if pages.k_scale is None else configs.DENSE_DECODE_FP8)[target.arch]
    # By the width of the table, not the lengths of today: a captured graph serves all lengths that fit.
    most_units = batch.block_table.shape[1] * PAGE // config["BLOCK_N"]
    programs = segment.num_rows * pages.k.shape[1]
    splits = num_splits(target, programs, most_units, configs.DENSE_DECODE_PROGRAMS)
    _attend(target, q, pages, None, batch, segment, scale, out, config, splits)


def num_splits(target: Target, programs: int, most: int, rule: dict[str, tuple[int, int]]) -> int:
    """Programs among which the keys of each of `programs` (row, group) pairs are split: a power of two <= `most`."""
    per_unit, limit = rule[target.arch]
    wanted = min(per_unit * target.num_units // programs, limit, most)
    return 1 << (max(wanted, 1).bit_length() - 1)


def _attend(
    target: Target,
    q: Tensor,
    pages: KVPages,
    selection: Selection | None,
    batch: StepBatch,
    segment: Segment,
    scale: float,
    out: Tensor,
    config: LaunchConfig,
    splits: int,
) -> None:
    """Attend over the selected blocks, or over all where `selection` is None."""
    assert segment.row_start == segment.token_start == 0, "decode rows come first"
    num_rows, (_, num_heads, dim) = segment.num_rows, q.shape
    kv_heads = pages.k.shape[1]
    index_heads = 1 if selection is None else selection.blocks.shape[0]
    groups = max(kv_heads, index_heads)
    heads = num_heads // groups
    padded = max(16, triton.next_power_of_2(heads))
    assert pages.k.stride() == pages.v.stride() and pages.k.stride()[1:] == (PAGE * dim, dim, 1)
    assert q.stride()[1:] == out.stride()[1:] == (dim, 1)
    part = lse = None
    if splits > 1:
        part = torch.empty(num_rows, groups, splits, padded, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_rows, groups, padded, splits, dtype=torch.float32, device=q.device)
    target.launch(
        _decode_kernel,
        (num_rows, groups, splits),
        q,
        pages.k,
        pages.v,
        pages.k_scale,
        pages.v_scale,
        batch.block_table,
        batch.positions,
        None if selection is None else selection.blocks,
        None if selection is None else selection.num_blocks,
        out,
        part,
        lse,
        q.stride(0),
        pages.k.stride(0),
        batch.block_table.stride(0),
        0 if selection is None else selection.blocks.stride(0),
        out.stride(0),
        scale * LOG2_E,
        config=config,
        HEADS=heads,
        PADDED=padded,
        DIM=dim,
        KV_HEADS=kv_heads,
        INDEX_HEADS=index_heads,
        TOPK=0 if selection is None else selection.blocks.shape[2],
        SPLITS=splits,
        OVERLAP=target.overlaps,
        UPCAST=target.interpreted,
    )
    if part is not None and lse is not None:
        merge(target, part, lse, 0, heads, out)
