# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Mixture of experts for few tokens: each weight is read once, and nothing is sorted.

One token: two kernels of multiply and reduce. More: a program finds the tokens of its expert by comparing all ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs, configs_mx
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import SwigluParams
from engine.kernels.triton_common import follow, swiglu_oai
from engine.kernels.triton_linear import (
    from_row,
    inner_dot,
    inner_products,
    no_products,
    one_token_config,
    row_products,
    sum_products,
    weight_dot,
)
from engine.kernels.triton_moe_shared import PackedExperts, sum_ranks
from engine.kernels.triton_mx import Packed, PackedMX, tensors

# --- One token ---


@triton.jit
def _one_gate_up_kernel(
    x,
    w13,
    scales,
    ids,
    hidden,
    WIDTH,
    alpha,
    limit,
    beta,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile of BLOCK_N columns, rank). hidden: [ranks, WIDTH]."""
    follow(OVERLAP)
    start, rank = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    expert = tl.load(ids + rank).to(tl.int64)
    row = tl.arange(0, 2 * BLOCK_N)
    # Gate and up rows in turn: each pair of neighbours makes one element.
    rows = (row % 2) * WIDTH + tl.minimum(start + row // 2, WIDTH - 1)
    w13, scales = from_row(w13, scales, expert * 2 * WIDTH, K, FORMAT)
    acc = no_products(2 * BLOCK_N, BLOCK_K, FORMAT)
    acc = row_products(w13, scales, rows, x, 1.0, acc, K, BLOCK_K, EVEN_K, UPCAST, FORMAT, DECODE, False)
    gate, up = tl.split(tl.reshape(sum_products(acc, FORMAT, DECODE), [BLOCK_N, 2]))
    columns = start + tl.arange(0, BLOCK_N)
    values = swiglu_oai(gate, up, alpha, limit, beta).to(hidden.dtype.element_ty)
    tl.store(hidden + rank * WIDTH + columns, values, mask=columns < WIDTH)


@triton.jit
def _one_down_kernel(
    hidden,
    w2,
    scales,
    ids,
    weights,
    out,
    N,
    RANKS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile of BLOCK_N output columns): sums over all ranks. With OVERLAP, right behind _one_gate_up_kernel:
    what that one only reads is there."""
    start = tl.program_id(0) * BLOCK_N
    index = tl.arange(0, BLOCK_N)
    rows = tl.minimum(index, N - 1 - start)
    acc = no_products(BLOCK_N, BLOCK_K, FORMAT)
    for rank in tl.static_range(RANKS):
        expert = tl.load(ids + rank).to(tl.int64)
        weight = tl.load(weights + rank)
        base, base_scales = from_row(w2, scales, expert * N + start, K, FORMAT)
        acc = row_products(
            base, base_scales, rows, hidden + rank * K, weight, acc, K, BLOCK_K, EVEN_K, UPCAST, FORMAT, DECODE,
            OVERLAP and rank == 0,
        )  # fmt: skip
    tl.store(out + start + index, sum_products(acc, FORMAT, DECODE).to(out.dtype.element_ty), mask=start + index < N)


# --- Few tokens ---


@triton.jit
def _find_tokens(
    ids,
    slot,
    num_tokens,
    num_experts,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BY_EXPERT: tl.constexpr,
):
    """(expert, whether `slot` serves it, which tokens chose it [BLOCK_T], their pairs [BLOCK_T]).

    BY_EXPERT: slots are experts, from the last one on: the shared expert, with the most tokens, starts first.
    Else they are pairs, and the first pair of an expert serves all its tokens.
    """
    token, rank = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    pairs = token[:, None] * RANKS + rank[None, :]
    valid = (token < num_tokens)[:, None] & (rank < RANKS)[None, :]
    all_ids = tl.load(ids + pairs, mask=valid, other=-1).to(tl.int32)
    expert = num_experts - 1 - slot if BY_EXPERT else tl.load(ids + slot).to(tl.int32)
    match = all_ids == expert
    pair = tl.max(tl.where(match, pairs, -1), 1)
    chosen = pair >= 0
    if BY_EXPERT:
        serves = tl.sum(chosen.to(tl.int32), 0) > 0
    else:
        serves = tl.min(tl.where(chosen, pair, num_tokens * RANKS), 0) == slot
    return expert, serves, chosen, pair


@triton.jit
def _squeeze(chosen, pair, NARROW: tl.constexpr, BLOCK_T: tl.constexpr):
    """The first NARROW chosen pairs, in order: (valid [NARROW], pairs [NARROW])."""
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    column = tl.arange(0, NARROW)
    here = chosen[None, :] & (place[None, :] == column[:, None])
    return tl.max(here.to(tl.int32), 1) > 0, tl.sum(tl.where(here, pair[None, :], 0), 1)


@triton.jit
def _gate_up_columns(
    x,
    weight,
    scales,
    hidden,
    start,
    valid,
    pair,
    WIDTH,
    alpha,
    limit,
    beta,
    RANKS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
):
    """SwiGLU of one expert for BLOCK_N // 2 columns of `hidden` and the tokens of COLUMNS pairs."""
    half: tl.constexpr = BLOCK_N // 2
    row = tl.arange(0, BLOCK_N)
    # Eight gate rows, then their eight up rows: the matrix units keep rows r and r + 8 in one thread.
    rows = (row // 8 % 2) * WIDTH + tl.minimum(start + row // 16 * 8 + row % 8, WIDTH - 1)
    acc = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    acc = weight_dot(
        weight, scales, rows, x, pair // RANKS, valid, acc, K, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE
    )
    split = tl.permute(tl.reshape(acc, [BLOCK_N // 16, 2, 8, COLUMNS]), [0, 2, 3, 1])
    gate, up = tl.split(split)
    values = swiglu_oai(tl.reshape(gate, [half, COLUMNS]), tl.reshape(up, [half, COLUMNS]), alpha, limit, beta)
    columns = start + tl.arange(0, half)
    inside = valid[None, :] & (columns < WIDTH)[:, None]
    tl.store(hidden + pair[None, :] * WIDTH + columns[:, None], values.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _few_gate_up_kernel(
    x,
    w13,
    scales,
    ids,
    hidden,
    num_tokens,
    num_experts,
    WIDTH,
    alpha,
    limit,
    beta,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NARROW: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile of BLOCK_N // 2 columns, slot). hidden: [pairs, WIDTH]."""
    follow(OVERLAP)
    start = tl.program_id(0) * (BLOCK_N // 2)
    expert, serves, chosen, pair = _find_tokens(
        ids, tl.program_id(1), num_tokens, num_experts, RANKS, BLOCK_R, BLOCK_T, BY_EXPERT
    )
    if serves:
        weight, expert_scales = from_row(w13, scales, expert.to(tl.int64) * 2 * WIDTH, K, FORMAT)
        if NARROW < BLOCK_T:
            if tl.sum(chosen.to(tl.int32), 0) <= NARROW:
                valid, few = _squeeze(chosen, pair, NARROW, BLOCK_T)
                _gate_up_columns(
                    x, weight, expert_scales, hidden, start, valid, few, WIDTH, alpha, limit, beta,
                    RANKS, K, BLOCK_N, NARROW, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE,
                )  # fmt: skip
            else:
                _gate_up_columns(
                    x, weight, expert_scales, hidden, start, chosen, pair, WIDTH, alpha, limit, beta,
                    RANKS, K, BLOCK_N, BLOCK_T, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE,
                )  # fmt: skip
        else:
            _gate_up_columns(
                x, weight, expert_scales, hidden, start, chosen, pair, WIDTH, alpha, limit, beta,
                RANKS, K, BLOCK_N, BLOCK_T, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE,
            )  # fmt: skip


@triton.jit
def _down_columns(
    hidden,
    weight,
    scales,
    partial,
    start,
    valid,
    pair,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
):
    index = tl.arange(0, BLOCK_N)
    rows = tl.minimum(index, N - 1 - start)
    acc = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    acc = weight_dot(weight, scales, rows, hidden, pair, valid, acc, K, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE)
    inside = valid[None, :] & (start + index < N)[:, None]
    out = partial + start + pair[None, :] * N + index[:, None]
    tl.store(out, acc.to(partial.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _few_down_kernel(
    hidden,
    w2,
    scales,
    ids,
    partial,
    num_tokens,
    num_experts,
    N,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NARROW: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile of BLOCK_N output columns, slot). partial: [pairs, N], not yet weighted. With OVERLAP, right behind
    _few_gate_up_kernel: what that one only reads is there."""
    start = tl.program_id(0) * BLOCK_N
    expert, serves, chosen, pair = _find_tokens(
        ids, tl.program_id(1), num_tokens, num_experts, RANKS, BLOCK_R, BLOCK_T, BY_EXPERT
    )
    follow(OVERLAP)
    if serves:
        weight, expert_scales = from_row(w2, scales, expert.to(tl.int64) * N + start, K, FORMAT)
        if NARROW < BLOCK_T:
            if tl.sum(chosen.to(tl.int32), 0) <= NARROW:
                valid, few = _squeeze(chosen, pair, NARROW, BLOCK_T)
                _down_columns(
                    hidden, weight, expert_scales, partial, start, valid, few, N,
                    K, BLOCK_N, NARROW, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE,
                )  # fmt: skip
            else:
                _down_columns(
                    hidden, weight, expert_scales, partial, start, chosen, pair, N,
                    K, BLOCK_N, BLOCK_T, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE,
                )  # fmt: skip
        else:
            _down_columns(
                hidden, weight, expert_scales, partial, start, chosen, pair, N,
                K, BLOCK_N, BLOCK_T, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE,
            )  # fmt: skip


def one_token(
    target: Target, x: Tensor, packed: PackedExperts, weights: Tensor, ids: Tensor, act: SwigluParams, out: Tensor
) -> None:
    (w13, w2), ranks = packed, ids.shape[1]
    size, width = w2.shape[1:]
    hidden = x.new_empty(ranks, width)
    gate_up, down = _one_configs(target, w2)
    inner = inner_products(target, w13, gate_up)
    target.launch(
        _one_gate_up_kernel,
        (triton.cdiv(width, gate_up["BLOCK_N"]), ranks),
        *(x, *tensors(w13), ids, hidden, width, act.alpha, act.limit, act.beta),
        config=one_token_config(target, gate_up, w13, inner["BLOCK_K"]),
        OVERLAP=target.overlaps,
        **inner,
    )
    inner = inner_products(target, w2, down)
    target.launch(
        _one_down_kernel,
        (triton.cdiv(size, down["BLOCK_N"]),),
        *(hidden, *tensors(w2), ids, weights, out, size),
        config=one_token_config(target, down, w2, inner["BLOCK_K"]),
        RANKS=ranks,
        OVERLAP=target.overlaps,
        **inner,
    )


def few_tokens(
    target: Target, x: Tensor, packed: PackedExperts, weights: Tensor, ids: Tensor, act: SwigluParams, out: Tensor
) -> None:
    (w13, w2), (num_tokens, ranks) = packed, ids.shape
    num_experts, size, width = w2.shape
    hidden, partial = x.new_empty(num_tokens * ranks, width), x.new_empty(num_tokens * ranks, size)
    block_t = max(16, triton.next_power_of_2(num_tokens))
    gate_up, down = _few_configs(target, w2, x.dtype, num_tokens)
    slots = min(num_tokens * ranks, num_experts)
    tiles = {
        "RANKS": ranks,
        "BLOCK_R": triton.next_power_of_2(ranks),
        "BLOCK_T": block_t,
        "BY_EXPERT": slots == num_experts,
        "OVERLAP": target.overlaps,
    }
    target.launch(
        _few_gate_up_kernel,
        (triton.cdiv(width, gate_up["BLOCK_N"] // 2), slots),
        *(x, *tensors(w13), ids, hidden, num_tokens, num_experts, width, act.alpha, act.limit, act.beta),
        config=gate_up,
        **tiles,
        **inner_dot(target, w13, gate_up),
    )
    target.launch(
        _few_down_kernel,
        (triton.cdiv(size, down["BLOCK_N"]), slots),
        *(hidden, *tensors(w2), ids, partial, num_tokens, num_experts, size),
        config=down,
        **tiles,
        **inner_dot(target, w2, down),
    )
    sum_ranks(target, partial, weights, out)


def _one_configs(target: Target, weight: Packed) -> tuple[LaunchConfig, LaunchConfig]:
    if isinstance(weight, PackedMX):
        tables = configs_mx.MOE_ONE_GATE_UP[weight.format], configs_mx.MOE_ONE_DOWN[weight.format]
    else:
        tables = configs.MOE_ONE_GATE_UP, configs.MOE_ONE_DOWN
    return tables[0][target.arch], tables[1][target.arch]


def _few_configs(
    target: Target, weight: Packed, dtype: torch.dtype, num_tokens: int
) -> tuple[LaunchConfig, LaunchConfig]:
    if isinstance(weight, PackedMX):
        both = configs_mx.MOE_16 if num_tokens <= 16 else configs_mx.MOE_64
        return both[weight.format][0][target.arch], both[weight.format][1][target.arch]
    if dtype is torch.float32:
        config = configs.MOE_FEW_FP32[target.arch]
        return config, config
    if num_tokens <= 16:
        return configs.MOE_16_GATE_UP[target.arch], configs.MOE_16_DOWN[target.arch]
    return configs.MOE_64_GATE_UP[target.arch], configs.MOE_64_DOWN[target.arch]
