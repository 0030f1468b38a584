"""The lightning indexer: score key blocks, keep the best per token. torch_index.py has the rule.

Decode writes one float per block, and a second launch keeps the best. (One launch, where the program that scores a
row's last block selects for it, was slower on H100 at every size.) Prefill passes through a bounded scratch,
[block, token], window by window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from engine.kernels import configs, triton_sparse
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import KVPages, Selection, SelectParams
from engine.kernels.triton_score import score_decode, score_prefill
from engine.kernels.triton_topk import MEMBERS, select_decode, select_prefill

# From how many rows on programs share the blocks of all rows evenly; below, every row has its own programs, which
# need not look at the others' lengths first.
BALANCED_FROM = 2
# Prefill scores of one window of tokens: they should stay in a last-level cache, and memory must not grow with the
# context.
_SCRATCH_BYTES = 48 * 2**20


def select_blocks(
    target: Target,
    index_q: Tensor,
    pages: KVPages,
    batch: StepBatch,
    segment: Segment,
    params: SelectParams,
    out: Selection,
) -> None:
    """See torch_index.select_blocks; after prefill rows also fills out.unions."""
    if segment.phase == "decode":
        _select_decode(target, index_q, pages, batch, segment, params, out)
        return
    for window in _windows(batch, segment, index_q.shape[1]):
        _select_window(target, index_q, pages, batch, window, params, out)
    if out.unions is not None:
        triton_sparse.build_unions(target, out, batch, segment)


def _select_decode(
    target: Target,
    index_q: Tensor,
    pages: KVPages,
    batch: StepBatch,
    segment: Segment,
    params: SelectParams,
    out: Selection,
) -> None:
    """Rows and tokens of a decode segment are numbered alike, from 0."""
    assert pages.index_k is not None
    rows, (_, heads, dim), bound = segment.num_rows, index_q.shape, batch.block_table.shape[1]
    width = -(-bound // 16) * 16
    scores = torch.empty((rows, heads, width), dtype=torch.float32, device=index_q.device)
    balanced = rows >= BALANCED_FROM
    config = _decode_config(target, index_q, pages)
    select = configs.INDEX_SELECT_DECODE[target.arch]
    if bound > params.topk_blocks:
        programs = target.num_units * configs.INDEX_DECODE_PROGRAMS[target.arch][balanced]
        if balanced:
            grid: tuple[int, ...] = (max(rows, min(programs, rows * bound)), 1)
        else:
            grid = (min(bound, -(-programs // rows)), rows)
        target.launch(
            score_decode,
            grid,
            index_q,
            pages.index_k,
            pages.index_k_scale,
            batch.block_table,
            batch.seq_lens,
            scores,
            rows,
            index_q.stride(0),
            index_q.stride(1),
            pages.index_k.stride(0),
            pages.index_k.stride(1),
            batch.block_table.stride(0),
            scores.stride(0),
            scores.stride(1),
            config=config,
            TOPK=params.topk_blocks,
            HEADS=heads,
            DIM=dim,
            ROWS=triton.next_power_of_2(max(rows, 2)) if balanced else 1,
            SCALED=pages.index_k_scale is not None,
            BALANCED=balanced,
            OVERLAP=target.overlaps,
            UPCAST=target.interpreted,
        )
    select = _widened(select, bound)
    target.launch(
        select_decode,
        (rows, heads),
        scores,
        batch.seq_lens,
        out.blocks,
        out.num_blocks,
        scores.stride(0),
        scores.stride(1),
        out.blocks.stride(0),
        config=select,
        **_choice(params),
        **_row_groups(bound),
        OVERLAP=target.overlaps,
    )


def _choice(params: SelectParams) -> dict[str, int]:
    """How many blocks are kept, as constexprs."""
    topk = params.topk_blocks
    return {
        "TOPK": topk,
        "PADDED": triton.next_power_of_2(topk),
        "INIT_BLOCKS": params.init_blocks,
        "LOCAL_BLOCKS": params.local_blocks,
    }


def _decode_config(target: Target, index_q: Tensor, pages: KVPages) -> LaunchConfig:
    if index_q.dtype == torch.float32:
        return configs.INDEX_SCORE_DECODE_FP32[target.arch]
    # With several heads two warps have too few registers for a block.
    is_light = pages.index_k_scale is not None and index_q.shape[1] == 1
    return (configs.INDEX_SCORE_DECODE_FP8 if is_light else configs.INDEX_SCORE_DECODE)[target.arch]


def _widened(config: LaunchConfig, bound: int) -> LaunchConfig:
    """More warps where one cannot hold a row's scores in registers."""
    warps = max(config.num_warps, min(16, triton.next_power_of_2(bound) // 1024))
    return replace(config, num_warps=warps)


def _groups(num_blocks: int) -> int:
    """Groups of the selection's tile that holds so many blocks; two at least, as a scan asks for."""
    return max(2, int(triton.next_power_of_2(num_blocks)) // int(MEMBERS.value))


def _row_groups(bound: int) -> dict[str, int]:
    """Groups for a row of `bound` blocks, and for one of at most 256, which most rows are whatever the bound."""
    return {"GROUPS": _groups(bound), "FEW": min(_groups(bound), 8)}


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens [start, end) of a prefill segment, of rows [first_row, first_row + num_rows), that see up to
    num_blocks blocks."""

    start: int
    end: int
    first_row: int
    num_rows: int
    num_blocks: int


def _windows(batch: StepBatch, segment: Segment, heads: int) -> Iterator[_Window]:
    """Consecutive windows, such that the scores of each fit the scratch."""
    starts, page = batch.query_starts, 128
    most_blocks = -(-batch.max_seq_len(segment) // page)
    size = max(page, _SCRATCH_BYTES // (4 * heads * most_blocks) // page * page)
    first_row = segment.row_start
    for start in range(segment.token_start, segment.token_end, size):
        end = min(start + size, segment.token_end)
        while starts[first_row + 1] <= start:
            first_row += 1
        row, num_blocks = first_row, 0
        while row < segment.row_end and starts[row] < end:
            visible = batch.seq_lens_host[row] - max(0, starts[row + 1] - end)
            num_blocks = max(num_blocks, -(-visible // page))
            row += 1
        yield _Window(start, end, first_row, row - first_row, num_blocks)


def _select_window(
    target: Target,
    index_q: Tensor,
    pages: KVPages,
    batch: StepBatch,
    window: _Window,
    params: SelectParams,
    out: Selection,
) -> None:
    assert pages.index_k is not None
    _, heads, dim = index_q.shape
    num_tokens = window.end - window.start
    width = -(-num_tokens // 16) * 16
    scores = torch.empty((heads, window.num_blocks, width), dtype=torch.float32, device=index_q.device)
    if window.num_blocks > params.topk_blocks:
        config = _prefill_config(target, index_q)
        tiles = num_tokens // config["BLOCK_Q"] + window.num_rows
        # Programs enough to fill the device several times over, for balance, of blocks enough to be worth starting.
        chunk = max(4, -(-tiles * window.num_blocks * heads // (16 * target.num_units)))
        target.launch(
            score_prefill,
            (tiles * -(-window.num_blocks // chunk), heads),
            index_q,
            pages.index_k,
            pages.index_k_scale,
            batch.block_table,
            batch.positions,
            batch.query_start_loc,
            scores,
            window.first_row,
            window.num_rows,
            window.start,
            window.end,
            tiles,
            chunk,
            index_q.stride(0),
            index_q.stride(1),
            pages.index_k.stride(0),
            pages.index_k.stride(1),
            batch.block_table.stride(0),
            scores.stride(0),
            scores.stride(1),
            config=config,
            TOPK=params.topk_blocks,
            DIM=dim,
            NUM_XCD=8 if target.is_hip else 1,
            SCALED=pages.index_k_scale is not None,
            UPCAST=target.interpreted,
        )
    config, tile = _select_prefill_config(target, window.num_blocks)
    target.launch(
        select_prefill,
        (-(-num_tokens // tile["ROWS"]), heads),
        scores,
        batch.positions,
        out.blocks,
        out.num_blocks,
        window.start,
        window.end,
        scores.stride(0),
        scores.stride(1),
        out.blocks.stride(0),
        config=config,
        **_choice(params),
        **tile,
    )


def _prefill_config(target: Target, index_q: Tensor) -> LaunchConfig:
    is_float32 = index_q.dtype == torch.float32
    return (configs.INDEX_SCORE_PREFILL_FP32 if is_float32 else configs.INDEX_SCORE_PREFILL)[target.arch]


def _select_prefill_config(target: Target, num_blocks: int) -> tuple[LaunchConfig, dict[str, int]]:
    """The launch, and its tile: `SCORES` per thread, in one warp as long as that holds 4 rows, which share a sector."""
    config = configs.INDEX_SELECT_PREFILL[target.arch]
    groups = _groups(num_blocks)
    per_warp = config["SCORES"] * (64 if target.is_hip else 32)
    blocks = groups * MEMBERS.value
    rows = max(4 if blocks <= 4096 else 2, min(32, per_warp // blocks))
    warps = max(1, min(16, rows * blocks // per_warp))
    return LaunchConfig({}, warps, config.num_stages, config.hip, config.cuda), {"ROWS": rows, "GROUPS": groups}
