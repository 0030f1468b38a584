# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Mixture of experts for many tokens: a grouped GEMM over (token, rank) pairs sorted by expert.

One kernel sorts, stably; the products run over tiles of the sorted list. Which expert a tile belongs to is found on
the device, from a grid that is large enough for any routing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels import configs
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import SwigluParams
from engine.kernels.triton_common import operand, swiglu_oai
from engine.kernels.triton_linear import inner_sum, weight_tile
from engine.kernels.triton_moe_shared import sum_ranks

# Chiplets of an AMD accelerator, each with an L2 of its own; workgroup w runs on chiplet w % 8.
_XCDS = 8
# From this many pairs per expert on, most tiles of the large configurations are full.
_FULL_TILES = 64


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_pairs_kernel(ids, order, offsets, num_pairs, BLOCK: tl.constexpr, BLOCK_COUNT: tl.constexpr):
    """Program (expert): its pairs, ascending, into order[offsets[expert]:]. offsets: [experts + 1]."""
    expert = tl.program_id(0)
    index = tl.arange(0, BLOCK_COUNT)
    lower = tl.zeros([BLOCK_COUNT], tl.int32)
    for start in range(0, num_pairs, BLOCK_COUNT):
        lower += (tl.load(ids + start + index, mask=start + index < num_pairs, other=expert) < expert).to(tl.int32)
    first = tl.sum(lower, 0)
    tl.store(offsets + expert, first)
    if expert == tl.num_programs(0) - 1:
        tl.store(offsets + expert + 1, num_pairs)
    index = tl.arange(0, BLOCK)
    for start in range(0, num_pairs, BLOCK):
        match = tl.load(ids + start + index, mask=start + index < num_pairs, other=-1) == expert
        place = tl.cumsum(match.to(tl.int32), 0)
        tl.store(order + first + place - 1, start + index, mask=match)
        first += tl.sum(match.to(tl.int32), 0)


@triton.jit
def find_tile(
    offsets,
    tiles_n,
    num_experts,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    XCDS: tl.constexpr,
):
    """(expert or -1, first sorted pair, number of pairs, tile of columns) of this program.

    Experts in order; within one, groups of GROUP_M tiles of pairs share a tile of weights while it is in the cache.
    XCDS: neighbours run on one of that many chiplets, which each have their own cache.
    """
    index = tl.arange(0, BLOCK_E)
    starts = tl.load(offsets + index, mask=index < num_experts, other=0)
    ends = tl.load(offsets + index + 1, mask=index < num_experts, other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    programs = tiles * tiles_n
    upto = tl.cumsum(programs, 0)
    total = tl.sum(programs, 0)
    program = tl.program_id(0)
    inside = program < total
    if XCDS > 1:
        chiplet = program % XCDS
        moved = chiplet * (total // XCDS) + tl.minimum(chiplet, total % XCDS) + program // XCDS
        program = tl.where(inside, moved, program)
    expert = tl.sum((upto <= program).to(tl.int32), 0)
    mine = index == expert
    local = program - tl.sum(tl.where(mine, upto - programs, 0), 0)
    tiles_m = tl.sum(tl.where(mine, tiles, 0), 0)
    start = tl.sum(tl.where(mine, starts, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    group = local // (GROUP_M * tiles_n)
    size = tl.maximum(tl.minimum(tiles_m - group * GROUP_M, GROUP_M), 1)
    within = local - group * GROUP_M * tiles_n
    first = start + (group * GROUP_M + within % size) * BLOCK_M
    return tl.where(inside, expert, -1), first, tl.minimum(end - first, BLOCK_M), within // size


@triton.jit
def _token_tile(x, tokens, valid, columns, K: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr):
    """[tokens, columns] of x, [num, K]; tokens that are not `valid` read as 0."""
    inside = valid[:, None] if EVEN_K else valid[:, None] & (columns < K)[None, :]
    return operand(tl.load(x + tokens[:, None] * K + columns[None, :], mask=inside, other=0.0), UPCAST)


@triton.jit
def _gate_up_rows(
    x,
    w13,
    order,
    hidden,
    expert,
    first,
    count,
    start,
    WIDTH,
    alpha,
    limit,
    beta,
    RANKS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    half: tl.constexpr = BLOCK_N // 2
    index, row = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    valid = index < count
    tokens = tl.load(order + first + index, mask=valid, other=0) // RANKS
    hidden += first.to(tl.int64) * WIDTH
    # Flattened: the loads of the next tile run while this one is finished.
    for step in tl.range(0, SPAN, flatten=SPAN > 1):
        n = start + step * half
        # Gate and up rows in turn: the matrix units keep neighbouring columns in one thread.
        rows = (row % 2) * WIDTH + tl.minimum(n + row // 2, WIDTH - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            values = _token_tile(x, tokens, valid, columns, K, EVEN_K, UPCAST)
            if TMA:
                tile = tl.reshape(w13.load([expert, n, 0, k]), [BLOCK_N, BLOCK_K])
            else:
                tile = weight_tile(w13 + expert.to(tl.int64) * 2 * WIDTH * K, rows, columns, K, EVEN_K, UPCAST)
            acc = tl.dot(values, tl.trans(tile), acc, input_precision="ieee")
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, half, 2]))
        values = swiglu_oai(gate, up, alpha, limit, beta).to(hidden.dtype.element_ty)
        columns = n + tl.arange(0, half)
        inside = valid[:, None] & (columns < WIDTH)[None, :]
        tl.store(hidden + index[:, None] * WIDTH + columns[None, :], values, mask=inside)


@triton.jit
def _many_gate_up_kernel(
    x,
    w13,
    order,
    offsets,
    hidden,
    num_experts,
    spans,
    WIDTH,
    alpha,
    limit,
    beta,
    RANKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    XCDS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program: a tile of sorted pairs times SPAN tiles of BLOCK_N // 2 columns. hidden: [pairs, WIDTH], sorted.

    An expert's last tile is often short: up to SMALL_M pairs of it are multiplied as a smaller tile.
    w13: a tensor, or with TMA the descriptor of _gate_up_descriptor.
    """
    expert, first, count, tile = find_tile(offsets, spans, num_experts, BLOCK_E, BLOCK_M, GROUP_M, XCDS)
    start = tile * (BLOCK_N // 2 * SPAN)
    if expert >= 0:
        if SMALL_M < BLOCK_M:
            if count <= SMALL_M:
                _gate_up_rows(
                    x, w13, order, hidden, expert, first, count, start, WIDTH, alpha, limit, beta,
                    RANKS, K, SMALL_M, BLOCK_N, BLOCK_K, SPAN, TMA, EVEN_K, UPCAST,
                )  # fmt: skip
            else:
                _gate_up_rows(
                    x, w13, order, hidden, expert, first, count, start, WIDTH, alpha, limit, beta,
                    RANKS, K, BLOCK_M, BLOCK_N, BLOCK_K, SPAN, TMA, EVEN_K, UPCAST,
                )  # fmt: skip
        else:
            _gate_up_rows(
                x, w13, order, hidden, expert, first, count, start, WIDTH, alpha, limit, beta,
                RANKS, K, BLOCK_M, BLOCK_N, BLOCK_K, SPAN, TMA, EVEN_K, UPCAST,
            )  # fmt: skip


@triton.jit
def _down_rows(
    hidden,
    w2,
    order,
    partial,
    expert,
    first,
    count,
    start,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    index, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    valid = index < count
    pairs = tl.load(order + first + index, mask=valid, other=0).to(tl.int64)
    hidden += first.to(tl.int64) * K
    out = partial + pairs[:, None] * N + column[None, :]
    # Flattened: the loads of the next tile run during the stores of this one.
    for step in tl.range(0, SPAN, flatten=SPAN > 1):
        n = start + step * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            values = _token_tile(hidden, index, valid, columns, K, EVEN_K, UPCAST)
            if TMA:
                tile = w2.load([expert * N + n, k])
            else:
                rows = tl.minimum(n + column, N - 1)
                tile = weight_tile(w2 + expert.to(tl.int64) * N * K, rows, columns, K, EVEN_K, UPCAST)
            acc = tl.dot(values, tl.trans(tile), acc, input_precision="ieee")
        inside = valid[:, None] & (n + column < N)[None, :]
        tl.store(out + n, acc.to(partial.dtype.element_ty), mask=inside)


@triton.jit
def _many_down_kernel(
    hidden,
    w2,
    order,
    offsets,
    partial,
    num_experts,
    spans,
    N,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    XCDS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program: a tile of sorted pairs times SPAN tiles of BLOCK_N columns. partial: [pairs, N], by pair, not weighted.

    w2: a tensor, or with TMA the descriptor of _down_descriptor.
    """
    expert, first, count, tile = find_tile(offsets, spans, num_experts, BLOCK_E, BLOCK_M, GROUP_M, XCDS)
    start = tile * (BLOCK_N * SPAN)
    if expert >= 0:
        if SMALL_M < BLOCK_M:
            if count <= SMALL_M:
                _down_rows(
                    hidden, w2, order, partial, expert, first, count, start, N,
                    K, SMALL_M, BLOCK_N, BLOCK_K, SPAN, TMA, EVEN_K, UPCAST,
                )  # fmt: skip
            else:
                _down_rows(
                    hidden, w2, order, partial, expert, first, count, start, N,
                    K, BLOCK_M, BLOCK_N, BLOCK_K, SPAN, TMA, EVEN_K, UPCAST,
                )  # fmt: skip
        else:
            _down_rows(
                hidden, w2, order, partial, expert, first, count, start, N,
                K, BLOCK_M, BLOCK_N, BLOCK_K, SPAN, TMA, EVEN_K, UPCAST,
            )  # fmt: skip


def sort_pairs(target: Target, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs sorted by expert, int32 [pairs], and where each expert's begin, int32 [num_experts + 1]."""
    order = ids.new_empty(ids.numel(), dtype=torch.int32)
    offsets = ids.new_empty(num_experts + 1, dtype=torch.int32)
    config = configs.MOE_SORT[target.arch]
    target.launch(_sort_pairs_kernel, (num_experts,), ids, order, offsets, ids.numel(), config=config)
    return order, offsets


def tile_search(target: Target, num_experts: int) -> dict[str, int]:
    """Constexprs of `find_tile`."""
    return {"BLOCK_E": triton.next_power_of_2(num_experts), "XCDS": _XCDS if target.is_hip else 1}


def many_tokens(
    target: Target,
    x: Tensor,
    packed: tuple[Tensor, Tensor],
    weights: Tensor,
    ids: Tensor,
    act: SwigluParams,
    out: Tensor,
) -> None:
    (w13, w2), (num_tokens, ranks) = packed, ids.shape
    num_experts, size, width = w2.shape
    num_pairs = num_tokens * ranks
    hidden, partial = x.new_empty(num_pairs, width), x.new_empty(num_pairs, size)
    order, offsets = sort_pairs(target, ids, num_experts)
    common = tile_search(target, num_experts)
    gate_up, down = _many_configs(target, x.dtype, num_pairs // num_experts)
    # Descriptors need rows that start at multiples of 16 bytes.
    aligned = size % 8 == 0 and width % 8 == 0
    spans = triton.cdiv(width, gate_up["BLOCK_N"] // 2 * gate_up["SPAN"])
    constexprs = inner_sum(target, w13, gate_up)
    constexprs["TMA"] = tma = int(aligned and gate_up["TMA"])
    weight = _gate_up_descriptor(w13, gate_up["BLOCK_N"], constexprs["BLOCK_K"]) if tma else w13
    target.launch(
        _many_gate_up_kernel,
        (max_tiles(num_pairs, num_experts, gate_up["BLOCK_M"]) * spans,),
        *(x, weight, order, offsets, hidden, num_experts, spans, width, act.alpha, act.limit, act.beta),
        config=gate_up,
        RANKS=ranks,
        **common,
        **constexprs,
    )
    spans = triton.cdiv(size, down["BLOCK_N"] * down["SPAN"])
    constexprs = inner_sum(target, w2, down)
    constexprs["TMA"] = tma = int(aligned and down["TMA"])
    weight = _down_descriptor(w2, down["BLOCK_N"], constexprs["BLOCK_K"]) if tma else w2
    target.launch(
        _many_down_kernel,
        (max_tiles(num_pairs, num_experts, down["BLOCK_M"]) * spans,),
        *(hidden, weight, order, offsets, partial, num_experts, spans, size),
        config=down,
        **common,
        **constexprs,
    )
    sum_ranks(target, partial, weights, out)


def _gate_up_descriptor(w13: Tensor, block_n: int, block_k: int) -> TensorDescriptor:
    """Tiles of block_n rows of w13, gate and up rows in turn."""
    num_experts, rows, size = w13.shape
    shape, strides = [num_experts, rows // 2, 2, size], [rows * size, size, rows // 2 * size, 1]
    return TensorDescriptor(w13, shape, strides, [1, block_n // 2, 2, block_k])


def _down_descriptor(w2: Tensor, block_n: int, block_k: int) -> TensorDescriptor:
    """Tiles of block_n rows of w2. One that crosses into the next expert brings rows that are not stored."""
    num_experts, rows, width = w2.shape
    return TensorDescriptor(w2, [num_experts * rows, width], [width, 1], [block_n, block_k])


def _many_configs(target: Target, dtype: torch.dtype, pairs_per_expert: int) -> tuple[LaunchConfig, LaunchConfig]:
    if dtype is torch.float32:
        config = configs.MOE_MANY_FP32[target.arch]
        return config, config
    if pairs_per_expert < _FULL_TILES:
        config = configs.MOE_MANY_SHORT[target.arch]
        return config, config
    return configs.MOE_MANY_GATE_UP[target.arch], configs.MOE_MANY_DOWN[target.arch]


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Tiles of sorted pairs under the worst routing: each expert can leave one unfinished."""
    return min(num_pairs, num_pairs // block_m + num_experts)
