"""Mixture of experts: the grouped products of w13 (with SwiGLU) and w2."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import configs
from engine.kernels.launch import Target
from engine.kernels.params import SwigluParams
from engine.kernels.triton_moe_few import few_tokens, one_token
from engine.kernels.triton_moe_many import many_tokens
from engine.kernels.triton_moe_shared import PackedExperts


def pack_experts(target: Target, w13: Tensor, w2: Tensor) -> PackedExperts:
    """Prepare expert weights for `experts`. w13: [num_experts, 2 * width, hidden]; w2: [num_experts, hidden, width]."""
    return w13.contiguous(), w2.contiguous()


def experts(
    target: Target, x: Tensor, packed: PackedExperts, weights: Tensor, ids: Tensor, act: SwigluParams
) -> Tensor:
    """See torch_linear.experts."""
    num_tokens = x.shape[0]
    out = torch.empty_like(x)
    if num_tokens == 0:
        return out
    run = one_token if num_tokens == 1 else few_tokens
    if num_tokens > configs.MOE_FEW_TOKENS[target.arch]:
        run = many_tokens
    run(target, x.contiguous(), packed, weights.contiguous(), ids.contiguous(), act, out)
    return out
