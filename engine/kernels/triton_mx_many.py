# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Mixture of experts for many tokens, with weights of the MX formats.

As triton_moe_many.py, but with the weights on the M side of the products: on NVIDIA that operand may come from
registers, where it was decoded, and the tokens from shared memory, where they were loaded to.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs_mx
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import SwigluParams
from engine.kernels.triton_common import swiglu_oai
from engine.kernels.triton_linear import from_row, inner_dot
from engine.kernels.triton_moe_many import find_tile, max_tiles, sort_pairs, tile_search
from engine.kernels.triton_moe_shared import sum_ranks
from engine.kernels.triton_mx import PackedMX, mx_dot

# From this many pairs per expert on, most tiles of the large configurations are full.
_FULL_TILES = 64


@triton.jit
def _gate_up_kernel(
    x,
    w13,
    scales,
    order,
    offsets,
    hidden,
    num_experts,
    tiles_n,
    WIDTH,
    alpha,
    limit,
    beta,
    RANKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    XCDS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Program: a tile of BLOCK_M sorted pairs times BLOCK_N // 2 columns. hidden: [pairs, WIDTH], sorted."""
    half: tl.constexpr = BLOCK_N // 2
    expert, first, count, tile = find_tile(offsets, tiles_n, num_experts, BLOCK_E, BLOCK_M, GROUP_M, XCDS)
    if expert >= 0:
        start = tile * half
        index, row = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        valid = index < count
        tokens = tl.load(order + first + index, mask=valid, other=0) // RANKS
        # Eight gate rows, then their eight up rows: the matrix units keep rows r and r + 8 in one thread.
        rows = (row // 8 % 2) * WIDTH + tl.minimum(start + row // 16 * 8 + row % 8, WIDTH - 1)
        weight, scales = from_row(w13, scales, expert.to(tl.int64) * 2 * WIDTH, K, FORMAT)
        acc = mx_dot(weight, scales, rows, x, tokens, valid, K, BLOCK_K, SPLIT, FORMAT, DECODE, UPCAST)
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 16, 2, 8, BLOCK_M]), [0, 2, 3, 1]))
        values = swiglu_oai(tl.reshape(gate, [half, BLOCK_M]), tl.reshape(up, [half, BLOCK_M]), alpha, limit, beta)
        columns = start + tl.arange(0, half)
        inside = valid[None, :] & (columns < WIDTH)[:, None]
        hidden += first.to(tl.int64) * WIDTH
        out = hidden + index[None, :] * WIDTH + columns[:, None]
        tl.store(out, values.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(
    hidden,
    w2,
    scales,
    order,
    offsets,
    partial,
    num_experts,
    tiles_n,
    N,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    XCDS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Program: a tile of sorted pairs times BLOCK_N columns. partial: [pairs, N], by pair, not weighted."""
    expert, first, count, tile = find_tile(offsets, tiles_n, num_experts, BLOCK_E, BLOCK_M, GROUP_M, XCDS)
    if expert >= 0:
        start = tile * BLOCK_N
        index, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        valid = index < count
        pairs = tl.load(order + first + index, mask=valid, other=0).to(tl.int64)
        rows = tl.minimum(column, N - 1 - start)
        weight, scales = from_row(w2, scales, expert.to(tl.int64) * N + start, K, FORMAT)
        hidden += first.to(tl.int64) * K
        acc = mx_dot(weight, scales, rows, hidden, index, valid, K, BLOCK_K, SPLIT, FORMAT, DECODE, UPCAST)
        inside = valid[None, :] & (start + column < N)[:, None]
        out = partial + pairs[None, :] * N + (start + column)[:, None]
        tl.store(out, acc.to(partial.dtype.element_ty), mask=inside)


def mx_many_tokens(
    target: Target,
    x: Tensor,
    packed: tuple[PackedMX, PackedMX],
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
    gate_up, down = _configs(target, w2, num_pairs // num_experts)
    tiles = triton.cdiv(width, gate_up["BLOCK_N"] // 2)
    target.launch(
        _gate_up_kernel,
        (max_tiles(num_pairs, num_experts, gate_up["BLOCK_M"]) * tiles,),
        *(x, w13.values, w13.scales, order, offsets, hidden, num_experts, tiles, width),
        *(act.alpha, act.limit, act.beta),
        config=gate_up,
        RANKS=ranks,
        **common,
        **inner_dot(target, w13, gate_up),
    )
    tiles = triton.cdiv(size, down["BLOCK_N"])
    target.launch(
        _down_kernel,
        (max_tiles(num_pairs, num_experts, down["BLOCK_M"]) * tiles,),
        *(hidden, w2.values, w2.scales, order, offsets, partial, num_experts, tiles, size),
        config=down,
        **common,
        **inner_dot(target, w2, down),
    )
    sum_ranks(target, partial, weights, out)


def _configs(target: Target, weight: PackedMX, pairs_per_expert: int) -> tuple[LaunchConfig, LaunchConfig]:
    tables = configs_mx.MOE_MANY if pairs_per_expert >= _FULL_TILES else configs_mx.MOE_SHORT
    gate_up, down = tables[weight.format]
    return gate_up[target.arch], down[target.arch]
