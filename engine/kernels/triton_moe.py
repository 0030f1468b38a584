"""Mixture of experts: the grouped products of w13 (with SwiGLU) and w2."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import configs
from engine.kernels.launch import Target
from engine.kernels.params import SwigluParams, Weight
from engine.kernels.triton_linear import multiplies_rows, pack_linear
from engine.kernels.triton_moe_few import few_tokens, one_token
from engine.kernels.triton_moe_many import many_tokens
from engine.kernels.triton_moe_shared import PackedExperts
from engine.kernels.triton_mx import PackedMX, dequantise
from engine.kernels.triton_mx_many import mx_many_tokens


def pack_experts(target: Target, w13: Weight, w2: Weight) -> PackedExperts:
    """Prepare expert weights for `experts`. w13: [num_experts, 2 * width, hidden]; w2: [num_experts, hidden, width]."""
    return pack_linear(target, w13), pack_linear(target, w2)


def experts(
    target: Target, x: Tensor, packed: PackedExperts, weights: Tensor, ids: Tensor, act: SwigluParams
) -> Tensor:
    """See torch_linear.experts."""
    num_tokens = x.shape[0]
    out = torch.empty_like(x)
    if num_tokens == 0:
        return out
    w13, w2 = packed
    # fp32 is for parity tests.
    if isinstance(w13, PackedMX) and isinstance(w2, PackedMX) and x.dtype is torch.float32 and not target.interpreted:
        w13, w2 = dequantise(target, w13, x.dtype), dequantise(target, w2, x.dtype)
    inputs = (weights.contiguous(), ids.contiguous(), act, out)
    if num_tokens <= configs.MOE_FEW_TOKENS[target.arch]:
        run = one_token if multiplies_rows(w2, num_tokens) else few_tokens
        run(target, x.contiguous(), (w13, w2), *inputs)
    elif isinstance(w13, PackedMX) and isinstance(w2, PackedMX):
        mx_many_tokens(target, x.contiguous(), (w13, w2), *inputs)
    else:
        assert isinstance(w13, Tensor) and isinstance(w2, Tensor), "w13 and w2 are of one format"
        many_tokens(target, x.contiguous(), (w13, w2), *inputs)
    return out
