"""Linear layers, the router and the experts, in plain torch.

On CPU the weights are re-ordered once for oneDNN: its packed GEMM reaches the memory bandwidth at decode sizes, where
the default path loses half of it, and its result for a row does not depend on how many other rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.params import MXWeight, RouteParams, SwigluParams, Weight
from engine.kernels.torch_mx import dequantise

# A hint for the packed layout only; any batch size may be multiplied.
_PACK_ROWS = 16
# oneDNN compiles a kernel per number of rows (~1 ms) and keeps 1024 of them: larger batches are rounded up.
_ROW_STEP = 32


def pack_linear(weight: Weight) -> Tensor:
    """Prepare a weight for `linear`. weight: [out, in] of float32 or bfloat16; the result is opaque.

    A block-scaled weight becomes bfloat16; who computes in float32 converts it before.
    """
    if isinstance(weight, MXWeight):
        weight = dequantise(weight, torch.bfloat16)
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)  # type: ignore[no-any-return]
    return weight.contiguous()


def linear(x: Tensor, packed: Tensor) -> Tensor:
    """x @ weight.T. x: [num_tokens, in]; packed: from `pack_linear`; returns [num_tokens, out]."""
    if packed.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, packed)


def swiglu(gate_up: Tensor, params: SwigluParams) -> Tensor:
    """SwiGLU-OAI. gate_up: [num_tokens, 2 * width], all gates then all ups; returns [num_tokens, width].

    The clamps and the sigmoid are taken in fp32. gate_up may be overwritten.
    """
    width = gate_up.shape[-1] // 2
    values = gate_up.float()
    gate, up = values[..., :width], values[..., width:]
    gate.clamp_(max=params.limit)
    up.clamp_(min=-params.limit, max=params.limit).add_(params.beta)
    return torch.sigmoid(gate * params.alpha).mul_(gate).mul_(up).to(gate_up.dtype)


def route(x: Tensor, gate: Tensor, bias: Tensor, params: RouteParams) -> tuple[Tensor, Tensor]:
    """Sigmoid router in fp32; the bias decides the choice only, ties go to the lower expert id.

    x: [num_tokens, hidden].  gate: packed float32 [num_experts, hidden].  bias: float32 [num_experts].
    Returns weights float32 [num_tokens, params.width], the routed ones scaled to sum to `scale`, and their expert ids
    [num_tokens, params.width], by rank.
    """
    # torch's fp32 sigmoid rounds the last few elements of a tensor differently from the others: a row's weights
    # would depend on how many rows follow it.
    scores = torch.sigmoid(linear(x.float(), gate).double()).float()
    ids = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, : params.top_k]
    weights = scores.gather(-1, ids)
    weights = weights * (params.scale / weights.sum(-1, keepdim=True))
    if params.shared:
        weights, ids = F.pad(weights, (0, 1), value=1.0), F.pad(ids, (0, 1), value=len(bias))
    return weights, ids


PackedExperts = tuple[list[Tensor], list[Tensor]]


def pack_experts(w13: Weight, w2: Weight) -> PackedExperts:
    """Prepare expert weights for `experts`. w13: [num_experts, 2 * width, hidden]; w2: [num_experts, hidden, width]."""
    plain = [dequantise(w, torch.bfloat16) if isinstance(w, MXWeight) else w for w in (w13, w2)]
    first, second = ([pack_linear(matrix) for matrix in w.unbind()] for w in plain)
    return first, second


def experts(x: Tensor, packed: PackedExperts, weights: Tensor, ids: Tensor, act: SwigluParams) -> Tensor:
    """sum over the chosen experts of weight * w2(swiglu(w13(x))).

    x: [num_tokens, hidden].  weights: float32 [num_tokens, top_k], ids: [num_tokens, top_k], both from `route`.
    Returns [num_tokens, hidden]; the sum runs in fp32, in the order of the router's ranks.
    """
    w13, w2 = packed
    num_tokens, top_k = ids.shape
    flat_ids = ids.reshape(-1)
    order = torch.argsort(flat_ids, stable=True)
    counts = torch.bincount(flat_ids, minlength=len(w13)).tolist()
    # Rounded-up row counts reach into the next expert's rows, and behind the last one's: nothing reads what comes out.
    spare = 0 if num_tokens * top_k <= _ROW_STEP else _ROW_STEP
    sorted_x = x[F.pad(order // top_k, (0, spare))]
    runs: list[tuple[int, int, int, int]] = []  # expert, first row, rows, rows rounded up
    start = 0
    for expert, count in enumerate(counts):
        if count:
            padded = count if count <= _ROW_STEP else -(-count // _ROW_STEP) * _ROW_STEP
            runs.append((expert, start, count, padded))
            start += count
    gate_up = torch.cat([linear(sorted_x[s : s + padded], w13[e])[:count] for e, s, count, padded in runs])
    hidden = F.pad(swiglu(gate_up, act), (0, 0, 0, spare))
    pair_out = torch.cat([linear(hidden[s : s + padded], w2[e])[:count] for e, s, count, padded in runs])
    by_rank = torch.empty_like(pair_out)
    by_rank[order] = pair_out
    ranked = by_rank.view(num_tokens, top_k, -1)
    out = ranked[:, 0] * weights[:, :1]
    for rank in range(1, top_k):
        out.addcmul_(ranked[:, rank], weights[:, rank : rank + 1])
    return out.to(x.dtype)
