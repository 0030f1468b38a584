"""Dense causal attention of prefill rows over their pages.

A program takes a tile of neighbouring tokens, times the query heads that share a KV head: those all read the same
keys, and together they are the rows of one matrix product. It walks the pages before the tile without a mask, then the
few keys around the diagonal with one. Where a step has too few tiles to fill the device (a short chunk after a long
prefix), several programs share the keys of a tile, as in decode.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import KVPages
from engine.kernels.triton_common import operand
from engine.kernels.triton_decode import LOG2_E, PAGE, converted, merge, num_splits


@triton.jit
def _walk(
    first,
    last,
    q,
    acc,
    largest,
    total,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    page_stride,
    scale_page_stride,
    positions,
    last_position,
    qk_scale,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to the keys of units [first, last) of BLOCK_N keys each. k_ptr, v_ptr, k_scale_ptr, v_scale_ptr: at the
    KV head of page 0. MASKED: hide keys after a row's position, the largest of which is last_position; else all are
    known to lie before it."""
    UNITS: tl.constexpr = 128 // BLOCK_N
    keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    kv_tile = keys[:, None] * DIM + dims[None, :]
    for unit in range(first, last):
        page = tl.load(table_ptr + unit // UNITS).to(tl.int64)
        offset = (unit % UNITS) * BLOCK_N
        base = page * page_stride + offset * DIM
        k = tl.load(k_ptr + base + kv_tile)
        if MASKED:
            # What an earlier owner left must not get into the product, not even as NaN * 0.
            written = unit * BLOCK_N + keys <= last_position
            v = tl.load(v_ptr + base + kv_tile, mask=written[:, None], other=0.0)
        else:
            v = tl.load(v_ptr + base + kv_tile)
        scores = tl.dot(q, tl.trans(converted(k, DTYPE)), input_precision="ieee")
        if k_scale_ptr is not None:
            scores *= tl.load(k_scale_ptr + page * scale_page_stride + offset + keys)[None, :]
        if MASKED:
            visible = unit * BLOCK_N + keys[None, :] <= positions[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        # The running maximum is finite and hidden scores are -inf: no NaN, whatever is hidden.
        new_largest = tl.maximum(largest, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - new_largest[:, None])
        alpha = tl.exp2(largest - new_largest)
        total = total * alpha + tl.sum(p, 1)
        if v_scale_ptr is not None:
            v_scales = v_scale_ptr + page * scale_page_stride + offset + keys
            p *= (tl.load(v_scales, mask=written, other=0.0) if MASKED else tl.load(v_scales))[None, :]
        acc = tl.dot(p.to(DTYPE), converted(v, DTYPE), acc * alpha[:, None], input_precision="ieee")
        largest = new_largest
    return acc, largest, total


@triton.jit(do_not_specialize=["first_row", "first_token", "table_stride"])
def _dense_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    starts_ptr,
    seq_lens_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    first_row,
    first_token,
    q_stride,
    page_stride,
    table_stride,
    out_stride,
    qk_scale,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles of the longest row, KV_HEADS * SPLITS, rows): neighbouring tokens of a row and the heads of one KV
    head, BLOCK_M together, over one split of their keys. part, lse: as `merge` takes them, by token of the segment."""
    TOKENS: tl.constexpr = BLOCK_M // PADDED
    row = first_row + tl.program_id(2)
    start = tl.load(starts_ptr + row)
    length = tl.load(starts_ptr + row + 1) - start
    # Late tiles see the most keys: they start first, so that none of them is left alone at the end.
    tile = tl.cdiv(length, TOKENS) - 1 - tl.program_id(0)
    if tile < 0:
        return
    kv_head, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    DTYPE: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    table_ptr += row * table_stride
    k_ptr += kv_head * 128 * DIM
    v_ptr += kv_head * 128 * DIM
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * 128
        v_scale_ptr += kv_head * 128

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    local, head = tile * TOKENS + rows // PADDED, rows % PADDED
    valid = (local < length) & (head < HEADS)
    columns = (kv_head * HEADS + head)[:, None] * DIM + dims[None, :]
    q = tl.load(q_ptr + (start + local)[:, None] * q_stride + columns, mask=valid[:, None], other=0.0)
    q = operand(q, UPCAST)

    prefix = tl.load(seq_lens_ptr + row) - length
    first_position = prefix + tile * TOKENS
    last_position = prefix + tl.minimum(tile * TOKENS + TOKENS, length) - 1
    num_units = last_position // BLOCK_N + 1
    share = tl.cdiv(num_units, SPLITS)
    first = split * share
    last = tl.minimum(first + share, num_units)
    # Units whose keys every token of the tile sees.
    past = tl.maximum(first, tl.minimum(last, (first_position + 1) // BLOCK_N))

    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    largest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, largest, total = _walk(
        first, past, q, acc, largest, total, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, page_stride,
        KV_HEADS * 128, prefix + local, last_position, qk_scale, DIM, BLOCK_N, DTYPE, False,
    )  # fmt: skip
    acc, largest, total = _walk(
        past, last, q, acc, largest, total, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, page_stride,
        KV_HEADS * 128, prefix + local, last_position, qk_scale, DIM, BLOCK_N, DTYPE, True,
    )  # fmt: skip

    if SPLITS == 1:
        acc = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (start + local)[:, None] * out_stride + columns, acc, mask=valid[:, None])
    else:
        seen = tl.where(total > 0, total, 1.0)
        pair = (start - first_token + local) * KV_HEADS + kv_head
        place = (pair * SPLITS + split) * PADDED + head
        tl.store(part_ptr + place[:, None] * DIM + dims[None, :], acc / seen[:, None], mask=valid[:, None])
        lse = tl.where(total > 0, largest + tl.log2(seen), float("-inf"))
        tl.store(lse_ptr + (pair * PADDED + head) * SPLITS + split, lse, mask=valid)


def attend_dense(
    target: Target, q: Tensor, pages: KVPages, batch: StepBatch, segment: Segment, scale: float, out: Tensor
) -> None:
    """torch_attention.attend_dense for a prefill segment."""
    config = _config(target, q, pages)
    num_heads, dim = q.shape[1:]
    kv_heads = pages.k.shape[1]
    heads = num_heads // kv_heads
    padded = triton.next_power_of_2(heads)
    tokens = config["BLOCK_M"] // padded
    assert tokens > 0, "a tile holds all heads of a token"
    assert pages.k.stride() == pages.v.stride() and pages.k.stride()[1:] == (PAGE * dim, dim, 1)
    assert q.stride()[1:] == out.stride()[1:] == (dim, 1)
    starts = batch.query_starts[segment.row_start : segment.row_end + 1]
    tiles = sum(-(-(end - start) // tokens) for start, end in pairwise(starts))
    most_units = batch.max_seq_len(segment) // configs.DENSE_PREFILL_SPLIT_KEYS
    splits = num_splits(target, tiles * kv_heads, most_units, configs.DENSE_PREFILL_PROGRAMS)
    part = lse = None
    if splits > 1:
        shape = (segment.num_tokens, kv_heads, splits, padded, dim)
        part = torch.empty(shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(segment.num_tokens, kv_heads, padded, splits, dtype=torch.float32, device=q.device)
    target.launch(
        _dense_kernel,
        (-(-batch.max_query_len(segment) // tokens), kv_heads * splits, segment.num_rows),
        q,
        pages.k,
        pages.v,
        pages.k_scale,
        pages.v_scale,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        out,
        part,
        lse,
        segment.row_start,
        segment.token_start,
        q.stride(0),
        pages.k.stride(0),
        batch.block_table.stride(0),
        out.stride(0),
        scale * LOG2_E,
        config=config,
        HEADS=heads,
        PADDED=padded,
        DIM=dim,
        KV_HEADS=kv_heads,
        SPLITS=splits,
        UPCAST=target.interpreted,
    )
    if part is not None and lse is not None:
        merge(target, part, lse, segment.token_start, heads, out)


def _config(target: Target, q: Tensor, pages: KVPages) -> LaunchConfig:
    if q.dtype == torch.float32:
        return configs.DENSE_PREFILL_FLOAT32[target.arch]
    return (configs.DENSE_PREFILL if pages.k_scale is None else configs.DENSE_PREFILL_FP8)[target.arch]
