# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the kernels of the mixture of experts share.

A pair is the number token * width + rank, where width is the number of experts per token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs
from engine.kernels.launch import Target
from engine.kernels.triton_common import follow
from engine.kernels.triton_mx import Packed

# w13 [num_experts, 2 * width, hidden], w2 [num_experts, hidden, width].
PackedExperts = tuple[Packed, Packed]


@triton.jit
def _sum_ranks_kernel(
    partial, weights, out, N, RANKS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Program (tile of BLOCK columns, token): out = sum of weight * partial, in the order of the ranks."""
    follow(OVERLAP)
    token = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partial += token.to(tl.int64) * RANKS * N
    acc = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        values = tl.load(partial + rank * N + columns, mask=columns < N, other=0.0)
        acc += tl.load(weights + token * RANKS + rank) * values.to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + columns, acc.to(out.dtype.element_ty), mask=columns < N)


def sum_ranks(target: Target, partial: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = sum over the ranks of weight * partial. partial: [pairs, size], weights: [num_tokens, ranks]."""
    num_tokens, size = out.shape
    config = configs.MOE_SUM[target.arch]
    grid = (triton.cdiv(size, config["BLOCK"]), num_tokens)
    constants = {"RANKS": weights.shape[1], "OVERLAP": target.overlaps}
    target.launch(_sum_ranks_kernel, grid, partial, weights, out, size, config=config, **constants)
