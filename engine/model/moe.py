"""Mixture of experts: sigmoid router, routed experts, one shared expert."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.api import SwigluParams
from engine.model.layers import MLP, Build


class MoE:
    """routed_scaling_factor * sum of the chosen experts + the shared expert."""

    def __init__(self, build: Build, layer_id: int) -> None:
        config = build.config
        prefix = f"model.layers.{layer_id}.block_sparse_moe."
        num_experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        part = build.parallel.part(width)
        self.kernels = build.kernels
        self.act = SwigluParams(config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        # The router stays fp32: in bf16 it picks other experts.
        self.gate = build.kernels.pack_linear(
            build.weights.take(f"{prefix}gate.weight", (num_experts, hidden), torch.float32)
        )
        self.bias = build.weights.take(f"{prefix}e_score_correction_bias", (num_experts,), torch.float32)
        local = part.stop - part.start
        w13 = torch.empty(num_experts, 2 * local, hidden, dtype=build.dtype)
        w2 = torch.empty(num_experts, hidden, local, dtype=build.dtype)
        for expert in range(num_experts):
            name = f"{prefix}experts.{expert}."
            for half, weight in enumerate(("w1", "w3")):
                w13[expert, half * local : (half + 1) * local] = build.weights.take(
                    f"{name}{weight}.weight", (width, hidden), build.dtype, rows=part
                )
            w2[expert] = build.weights.take(f"{name}w2.weight", (hidden, width), build.dtype, columns=part)
        self.experts = build.kernels.pack_experts(w13, w2)
        self.shared = MLP(build, f"{prefix}shared_experts.", config.shared_intermediate_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden].  Returns this rank's partial sum, [num_tokens, hidden]."""
        weights, ids = self.kernels.route(x, self.gate, self.bias, self.top_k, self.scale)
        return self.kernels.experts(x, self.experts, weights, ids, self.act) + self.shared(x)
