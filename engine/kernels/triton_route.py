# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The router: fp32 logits on tensor cores, then the choice of experts, in two launches.

bf16 activations times fp32 weights are exact in three bf16 products: a float32 is the sum of three bf16 numbers (8
significant bits each), and tensor cores accumulate in fp32. All decode batches share one reduction order, so that a
token's experts do not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import RouteParams
from engine.kernels.triton_common import follow, operand

# From this many tokens on, logits are bound by arithmetic and not by reading the weights.
_MANY_TOKENS = 512


@triton.jit
def _cut(x, UPCAST: tl.constexpr):
    """(The upper 8 significant bits of the float32 tile x as bf16, the rest as float32.) Both are exact."""
    bits = x.to(tl.uint32, bitcast=True)
    top = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    part = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return top if UPCAST else part, x - top


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x_ptr, gate_ptr, partial_ptr, num_tokens, x_stride,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, EXPERTS_ON_M: tl.constexpr, UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, expert tiles, splits): split s sums columns [s * SPLIT_K, (s + 1) * SPLIT_K).

    gate: float32 [EXPERTS, HIDDEN].  partial: float32 [splits, num_tokens, EXPERTS].
    EXPERTS_ON_M: experts are the rows of the matrix instruction, which split weights reach without leaving registers.
    """
    follow(OVERLAP)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.program_id(2) * SPLIT_K
    acc = tl.zeros((BLOCK_E, BLOCK_T) if EXPERTS_ON_M else (BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, SPLIT_K, BLOCK_K):
        column = first + start + tl.arange(0, BLOCK_K)
        inside = column < HIDDEN
        x = tl.load(
            x_ptr + token[:, None] * x_stride + column[None, :],
            mask=(token < num_tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        gate = tl.load(
            gate_ptr + expert[:, None] * HIDDEN + column[None, :],
            mask=(expert < EXPERTS)[:, None] & inside[None, :],
            other=0.0,
        )
        if x.dtype == tl.float32:
            acc = tl.dot(x, gate.T, acc, input_precision="ieee")
        else:
            top, gate = _cut(gate, UPCAST)
            middle, gate = _cut(gate, UPCAST)
            bottom, gate = _cut(gate, UPCAST)
            x = operand(x, UPCAST)
            if EXPERTS_ON_M:
                acc = tl.dot(bottom, x.T, acc)
                acc = tl.dot(middle, x.T, acc)
                acc = tl.dot(top, x.T, acc)
            else:
                acc = tl.dot(x, bottom.T, acc)
                acc = tl.dot(x, middle.T, acc)
                acc = tl.dot(x, top.T, acc)
    if EXPERTS_ON_M:
        acc = acc.T
    row = tl.program_id(2) * num_tokens + token
    tl.store(
        partial_ptr + row[:, None] * EXPERTS + expert[None, :],
        acc,
        mask=(token < num_tokens)[:, None] & (expert < EXPERTS)[None, :],
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _select_kernel(
    partial_ptr, bias_ptr, weights_ptr, ids_ptr, num_tokens, weight_sum,
    SPLITS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(num_tokens / ROWS)). weights: float32, ids: int32, both [num_tokens, WIDTH]; WIDTH is TOP_K, or one
    more with the shared expert."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    expert = tl.arange(0, PADDED)[None, :]
    bias = tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0)
    follow(OVERLAP)
    mask = (token < num_tokens) & (expert < EXPERTS)
    logits = tl.zeros((ROWS, PADDED), tl.float32)
    for split in tl.static_range(SPLITS):
        logits += tl.load(partial_ptr + (split * num_tokens + token) * EXPERTS + expert, mask=mask, other=0.0)
    scores = tl.sigmoid(logits)
    # One int64 per expert that orders like (score desc, id asc): the float's bits made monotonic, then the id inverted.
    bits = (scores + bias).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    lowest = tl.full((ROWS, PADDED), -0x8000000000000000, tl.int64)
    keys = tl.where(expert < EXPERTS, (ordered << 32) | (0x7FFFFFFF - expert).to(tl.int64), lowest)
    rank = tl.arange(0, PADDED_WIDTH)[None, :]
    weights = tl.zeros((ROWS, PADDED_WIDTH), tl.float32)
    ids = tl.full((ROWS, PADDED_WIDTH), EXPERTS, tl.int32)  # the shared expert's, where nothing else is put
    for k in tl.static_range(TOP_K):
        best = tl.max(keys, 1, keep_dims=True)
        chosen = keys == best
        weights = tl.where(rank == k, tl.sum(tl.where(chosen, scores, 0.0), 1, keep_dims=True), weights)
        ids = tl.where(rank == k, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), ids)
        keys = tl.where(chosen, lowest, keys)
    weights = weights * (weight_sum / tl.sum(weights, 1, keep_dims=True))
    weights = tl.where(rank < TOP_K, weights, 1.0)
    out = token * WIDTH + rank
    out_mask = (token < num_tokens) & (rank < WIDTH)
    tl.store(weights_ptr + out, weights, mask=out_mask)
    tl.store(ids_ptr + out, ids, mask=out_mask)


def route(target: Target, x: Tensor, gate: Tensor, bias: Tensor, params: RouteParams) -> tuple[Tensor, Tensor]:
    """See torch_linear.route. gate: contiguous float32 [num_experts, hidden]; the ids are int32."""
    (num_tokens, hidden), num_experts = x.shape, gate.shape[0]
    logits_config, select_config = _configs(target, num_tokens, x.dtype)
    splits = triton.cdiv(hidden, logits_config["SPLIT_K"])
    partial = torch.empty(splits, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    target.launch(
        _logits_kernel,
        (
            triton.cdiv(num_tokens, logits_config["BLOCK_T"]),
            triton.cdiv(num_experts, logits_config["BLOCK_E"]),
            splits,
        ),
        x,
        gate,
        partial,
        num_tokens,
        x.stride(0),
        config=logits_config,
        HIDDEN=hidden,
        EXPERTS=num_experts,
        UPCAST=target.interpreted,
        OVERLAP=target.overlaps,
    )
    weights = torch.empty(num_tokens, params.width, dtype=torch.float32, device=x.device)
    ids = torch.empty(num_tokens, params.width, dtype=torch.int32, device=x.device)
    target.launch(
        _select_kernel,
        (triton.cdiv(num_tokens, select_config["ROWS"]),),
        partial,
        bias,
        weights,
        ids,
        num_tokens,
        params.scale,
        config=select_config,
        SPLITS=splits,
        EXPERTS=num_experts,
        PADDED=triton.next_power_of_2(num_experts),
        TOP_K=params.top_k,
        WIDTH=params.width,
        PADDED_WIDTH=triton.next_power_of_2(params.width),
        OVERLAP=target.overlaps,
    )
    return weights, ids


def _configs(target: Target, num_tokens: int, dtype: torch.dtype) -> tuple[LaunchConfig, LaunchConfig]:
    """Of the logits and of the selection. The entries for decode differ in BLOCK_T only: it changes no sum."""
    if num_tokens >= _MANY_TOKENS:
        logits, select = configs.ROUTE_LOGITS_MANY, configs.ROUTE_SELECT_MANY
    else:
        logits = configs.ROUTE_LOGITS if num_tokens <= 16 else configs.ROUTE_LOGITS_SOME
        select = configs.ROUTE_SELECT
    if dtype == torch.float32:
        logits = configs.ROUTE_LOGITS_FLOAT32
    return logits[target.arch], select[target.arch]
