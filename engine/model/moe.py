"""Mixture of experts: sigmoid router, routed experts, one shared expert."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from engine.kernels.api import RouteParams, SwigluParams
from engine.model.layers import MLP, Build
from engine.model.quant import agreed_format, empty_weight, view


class MoE:
    """routed_scaling_factor * sum of the chosen experts + the shared expert."""

    def __init__(self, build: Build, layer_id: int) -> None:
        config = build.config
        prefix = f"model.layers.{layer_id}.block_sparse_moe."
        num_experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        part = build.parallel.part(width)
        self.kernels = build.kernels
        self.act = SwigluParams(config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)
        names = [
            tuple(f"{prefix}experts.{expert}.{name}.weight" for name in ("w1", "w3", "w2"))
            for expert in range(num_experts)
        ]
        shared = tuple(f"{prefix}shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))
        kind = agreed_format(build.weights, itertools.chain(*names))
        # Of the same width and format, the shared expert is one more expert of the grouped products.
        fused = config.shared_intermediate_size == width and agreed_format(build.weights, shared) == kind
        if fused:
            names.append(shared)
        self.routing = RouteParams(config.num_experts_per_tok, config.routed_scaling_factor, fused)
        # The router stays fp32: in bf16 it picks other experts.
        self.gate = build.kernels.pack_linear(
            build.weights.take(f"{prefix}gate.weight", (num_experts, hidden), torch.float32)
        )
        self.bias = build.weights.take(f"{prefix}e_score_correction_bias", (num_experts,), torch.float32)
        local = part.stop - part.start
        w13 = empty_weight(kind, (len(names), 2 * local, hidden), build.dtype, build.device)
        w2 = empty_weight(kind, (len(names), hidden, local), build.dtype, build.device)
        for expert, (gate, up, down) in enumerate(names):
            for name, half in ((gate, slice(local)), (up, slice(local, None))):
                out = view(w13, expert, half)
                build.weights.take_weight(name, (width, hidden), build.dtype, rows=part, out=out)
            build.weights.take_weight(down, (hidden, width), build.dtype, columns=part, out=view(w2, expert))
        self.experts = build.pack_experts(w13, w2)
        self.shared = None if fused else MLP(build, f"{prefix}shared_experts.", config.shared_intermediate_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden].  Returns this rank's partial sum, [num_tokens, hidden]."""
        weights, ids = self.kernels.route(x, self.gate, self.bias, self.routing)
        out = self.kernels.experts(x, self.experts, weights, ids, self.act)
        return out if self.shared is None else out + self.shared(x)
