"""Scores of key blocks: the largest product of an index query with the visible keys of each.

Decode streams the index keys once for all index heads, which is all its time; programs share the blocks of the batch
evenly, whatever the rows' lengths. Prefill scores a tile of tokens against one block at a time on the matrix units;
programs split the blocks.
"""

# Kernels are typed by Triton, not by Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.triton_common import follow, operand
from engine.kernels.triton_topk import NEVER, PAGE

# What differs from step to step: must not ask for another compilation.
_NOT_SPECIALISED = [
    "first_row",
    "num_rows",
    "window_start",
    "window_end",
    "num_tiles",
    "chunk_blocks",
    "table_stride",
]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _block_max(scores, axis: tl.constexpr, UPCAST: tl.constexpr):
    """The largest score, NaN if there is one."""
    if UPCAST:  # The interpreter would call _larger element by element.
        is_nan = tl.max((scores != scores).to(tl.int32), axis) > 0
        return tl.where(is_nan, float("nan"), tl.max(scores, axis))
    return tl.reduce(scores, axis, _larger)


@triton.jit
def _score_blocks(
    index_q,
    index_k,
    index_k_scale,
    table,
    scores,
    first,
    last,
    step,
    seq_len,
    q_head_stride,
    page_stride,
    key_stride,
    scores_head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Score blocks first, first + step, .. < last of one decode row; index_q, table and scores point at the row."""
    keys = tl.arange(0, PAGE)
    dims = tl.arange(0, DIM)
    offsets = keys[:, None] * key_stride + dims[None, :]
    for block in tl.range(first, last, step):
        page = tl.load(table + block).to(tl.int64)
        k = tl.load(index_k + page * page_stride + offsets, eviction_policy="evict_first").to(tl.float32)
        visible = keys + block * PAGE < seq_len
        # Multiplied and summed: with one query per head, a matrix unit would be idle but for one column.
        for head in tl.static_range(HEADS):
            q = tl.load(index_q + head * q_head_stride + dims).to(tl.float32)
            found = tl.sum(k * q[None, :], 1)
            if SCALED:
                found = found * tl.load(index_k_scale + page * PAGE + keys)
            best = _block_max(tl.where(visible, found, NEVER), 0, UPCAST)
            tl.store(scores + head * scores_head_stride + block, best)


@triton.jit(do_not_specialize=["num_rows"])
def score_decode(
    index_q,
    index_k,
    index_k_scale,
    block_table,
    seq_lens,
    scores,
    num_rows,
    q_row_stride,
    q_head_stride,
    page_stride,
    key_stride,
    table_stride,
    scores_row_stride,
    scores_head_stride,
    TOPK: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    BALANCED: tl.constexpr,
    OVERLAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (programs, 1 if BALANCED else rows). scores: float32 [rows, heads, blocks]; rows that keep all their
    blocks get none. ROWS: the rows, padded to a power of two."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    follow(OVERLAP)
    if BALANCED:
        # Program i scores the i-th equal share of all rows' blocks, laid end to end.
        rows = tl.arange(0, ROWS)
        counts = tl.cdiv(tl.load(seq_lens + rows, mask=rows < num_rows, other=0), PAGE)
        counts = tl.where(counts > TOPK, counts, 0)
        ends = tl.cumsum(counts, 0)
        total = tl.sum(counts, 0)
        share = tl.cdiv(total, num_programs)
        at = program * share
        stop = tl.minimum(at + share, total)
    else:
        at = 0
        stop = 1
    while at < stop:
        if BALANCED:
            row = tl.sum((ends <= at).to(tl.int32), 0)
            end = tl.sum(tl.where(rows == row, ends, 0), 0)
            begin = tl.sum(tl.where(rows == row, ends - counts, 0), 0)
            seq_len = tl.load(seq_lens + row)
            first = at - begin
            at = tl.minimum(stop, end)
            last = at - begin
            step = 1
        else:
            row = tl.program_id(1)
            seq_len = tl.load(seq_lens + row)
            first = program
            last = tl.cdiv(seq_len, PAGE)
            last = tl.where(last > TOPK, last, 0)
            step = num_programs
            at += 1
        _score_blocks(
            index_q + row * q_row_stride,
            index_k,
            index_k_scale,
            block_table + row * table_stride,
            scores + row * scores_row_stride,
            first,
            last,
            step,
            seq_len,
            q_head_stride,
            page_stride,
            key_stride,
            scores_head_stride,
            HEADS,
            DIM,
            SCALED,
            UPCAST,
        )


@triton.jit
def _tile_row(tile, query_start_loc, first_row, num_rows, window_start, BLOCK_Q: tl.constexpr):
    """The row of a tile, and the row's first tile. Row r starts at tile (its tokens before) // BLOCK_Q + r: at least
    as many tiles as it needs lie before the next row's."""
    low = first_row
    high = first_row + num_rows
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.maximum(tl.load(query_start_loc + middle), window_start)
        before = (start - window_start) // BLOCK_Q + middle - first_row <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.maximum(tl.load(query_start_loc + low), window_start)
    return low, (start - window_start) // BLOCK_Q + low - first_row


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def score_prefill(
    index_q,
    index_k,
    index_k_scale,
    block_table,
    positions,
    query_start_loc,
    scores,
    first_row,
    num_rows,
    window_start,
    window_end,
    num_tiles,
    chunk_blocks,
    q_token_stride,
    q_head_stride,
    page_stride,
    key_stride,
    table_stride,
    scores_head_stride,
    scores_block_stride,
    TOPK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_XCD: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles * chunks, heads). A program scores a tile of BLOCK_Q tokens of one row, of the window's, against
    a chunk of the row's blocks. scores: float32 [heads, blocks, window tokens]; tiles whose tokens keep all their
    blocks get none."""
    program = tl.program_id(0)
    if NUM_XCD > 1:
        # Neighbours share a chunk's keys: keep them on one die, and in its cache.
        total = tl.num_programs(0)
        short = total // NUM_XCD
        long_dies = total % NUM_XCD
        die = program % NUM_XCD
        program = die * short + tl.minimum(die, long_dies) + program // NUM_XCD
    tile = program % num_tiles
    head = tl.program_id(1)
    row, row_tile = _tile_row(tile, query_start_loc, first_row, num_rows, window_start, BLOCK_Q)
    start = tl.maximum(tl.load(query_start_loc + row), window_start) + (tile - row_tile) * BLOCK_Q
    end = tl.minimum(tl.load(query_start_loc + row + 1), window_end)
    if start >= end:
        return
    first_position = tl.load(positions + start).to(tl.int32)
    last_own = (first_position + tl.minimum(BLOCK_Q, end - start) - 1) // PAGE
    chunk = program // num_tiles * chunk_blocks
    if (last_own < TOPK) | (chunk > last_own):
        return
    rows = tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, PAGE)
    dims = tl.arange(0, DIM)
    used = start + rows < end
    q_base = index_q + start.to(tl.int64) * q_token_stride + head * q_head_stride
    q = tl.load(q_base + rows[:, None] * q_token_stride + dims[None, :], mask=used[:, None], other=0.0)
    q = operand(q, UPCAST)
    offsets = keys[:, None] * key_stride + dims[None, :]
    table = block_table + row * table_stride
    target = scores + head.to(tl.int64) * scores_head_stride + (start - window_start) + rows
    own = first_position // PAGE
    # Blocks before the first token's own are visible to the whole tile.
    for block in tl.range(chunk, tl.minimum(chunk + chunk_blocks, own)):
        page = tl.load(table + block).to(tl.int64)
        k = tl.load(index_k + page * page_stride + offsets)
        found = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if SCALED:
            found = found * tl.load(index_k_scale + page * PAGE + keys)[None, :]
        tl.store(target + block * scores_block_stride, _block_max(found, 1, UPCAST), mask=used)
    for block in tl.range(tl.maximum(chunk, own), tl.minimum(chunk + chunk_blocks, last_own + 1), num_stages=1):
        page = tl.load(table + block).to(tl.int64)
        k = tl.load(index_k + page * page_stride + offsets)
        found = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if SCALED:
            found = found * tl.load(index_k_scale + page * PAGE + keys)[None, :]
        visible = (keys + block * PAGE)[None, :] <= (first_position + rows)[:, None]
        best = _block_max(tl.where(visible, found, NEVER), 1, UPCAST)
        tl.store(target + block * scores_block_stride, best, mask=used)
