# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Linear layers of a few tokens, bound by reading the weight once; larger batches go to the vendor's GEMM, which on
H100 is as fast from 17 tokens on.

One token: multiply and reduce, every thread streams 16-byte pieces of the weight through registers. Up to 16: a matrix
product with the weight on the M side and the tokens, padded to a tile, on the N side (on
NVIDIA a tile of 64 weight rows thus uses wgmma whatever the number of tokens). There the order in which products are
summed over K does not depend on the number of tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import configs
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.triton_common import operand

# Fewer K elements than this per tile are no dot on any GPU.
_MIN_K = 16


@triton.jit
def weight_tile(weight, rows, columns, K: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, columns] of a weight with rows of K elements: the one place that knows how weights are stored.

    rows, columns: int32, the rows all valid; columns beyond K read as 0.
    """
    pointers = weight + rows[:, None] * K + columns[None, :]
    if EVEN_K:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        tile = tl.load(pointers, mask=(columns < K)[None, :], other=0.0, eviction_policy="evict_first")
    return operand(tile, UPCAST)


@triton.jit
def row_products(
    weight, rows, x, scale, acc, K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr
):
    """acc + the products of weight rows with scale * x, [rows, BLOCK_K] fp32: still to be summed over axis 1.

    x: [K].  Unrolled, so that the loads of all chunks can be in flight together.
    """
    for chunk in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        columns = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        tile = weight_tile(weight, rows, columns, K, EVEN_K, UPCAST)
        values = tl.load(x + columns) if EVEN_K else tl.load(x + columns, mask=columns < K, other=0.0)
        acc += tile.to(tl.float32) * (values.to(tl.float32) * scale)[None, :]
    return acc


@triton.jit
def weight_dot(
    weight,
    rows,
    x,
    tokens,
    valid,
    acc,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + weight rows times token rows, [rows, tokens] fp32.

    tokens: row numbers of x, [num, K], those that are not `valid` read as 0.
    """
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        tile = weight_tile(weight, rows, columns, K, EVEN_K, UPCAST)
        inside = valid[:, None] if EVEN_K else valid[:, None] & (columns < K)[None, :]
        values = operand(tl.load(x + tokens[:, None] * K + columns[None, :], mask=inside, other=0.0), UPCAST)
        acc = tl.dot(tile, tl.trans(values), acc, input_precision="ieee")
    return acc


@triton.jit
def _one_token_kernel(
    x,
    weight,
    out,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    index = tl.arange(0, BLOCK_N)
    rows = tl.minimum(index, N - 1 - start)
    weight += start.to(tl.int64) * K
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc = row_products(weight, rows, x, 1.0, acc, K, BLOCK_K, EVEN_K, UPCAST)
    tl.store(out + start + index, tl.sum(acc, 1).to(out.dtype.element_ty), mask=start + index < N)


@triton.jit
def _few_tokens_kernel(
    x,
    weight,
    out,
    num_tokens,
    N,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    index, tokens = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    rows = tl.minimum(index, N - 1 - start)
    weight += start.to(tl.int64) * K
    valid = tokens < num_tokens
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc = weight_dot(weight, rows, x, tokens, valid, acc, K, BLOCK_K, EVEN_K, UPCAST)
    out += start
    inside = valid[None, :] & (start + index < N)[:, None]
    tl.store(out + tokens[None, :] * N + index[:, None], acc.to(out.dtype.element_ty), mask=inside)


def pack_linear(target: Target, weight: Tensor) -> Tensor:
    """Prepare a weight for `linear`. weight: [out, in]; the result has the same shape."""
    return weight.contiguous()


def linear(target: Target, x: Tensor, packed: Tensor) -> Tensor:
    """See torch_linear.linear."""
    num_tokens = x.shape[0]
    # fp32 is for parity tests, where the vendor's exact GEMM is good enough.
    ours = x.dtype is not torch.float32 or target.interpreted
    if not ours or not 0 < num_tokens <= configs.LINEAR_MAX_TOKENS[target.arch]:
        return F.linear(x, packed)
    x = x.contiguous()
    size, width = packed.shape
    out = x.new_empty(num_tokens, size)
    config = _config(target, num_tokens, size)
    block_k = k_tile(width, config["BLOCK_K"])
    tiles = {"K": width, "BLOCK_K": block_k, "EVEN_K": width % block_k == 0, "UPCAST": target.interpreted}
    grid = (triton.cdiv(size, config["BLOCK_N"]),)
    if num_tokens == 1:
        config = one_token_config(target, config, block_k)
        target.launch(_one_token_kernel, grid, x, packed, out, size, config=config, **tiles)
    else:
        target.launch(_few_tokens_kernel, grid, x, packed, out, num_tokens, size, config=config, BLOCK_T=16, **tiles)
    return out


def k_tile(width: int, limit: int) -> int:
    """The largest power of two that divides `width`, up to `limit`: tiles without a ragged end need no masks."""
    return min(limit, max(_MIN_K, width & -width))


def one_token_config(target: Target, config: LaunchConfig, block_k: int) -> LaunchConfig:
    """`config` with as many warps as one row of BLOCK_K takes, at 8 elements (16 bytes) a thread. Then x is loaded in
    the very layout that the products need; with more warps, each chunk of it would pass through shared memory."""
    row = 8 * (64 if target.is_hip else 32)
    return replace(config, num_warps=max(1, block_k // row))


def _config(target: Target, num_tokens: int, size: int) -> LaunchConfig:
    if num_tokens == 1:
        return configs.LINEAR_ONE[target.arch]
    # With many rows a wide tile still covers the GPU, and reads the tokens less often.
    return (configs.LINEAR_16_WIDE if size >= 16384 else configs.LINEAR_16)[target.arch]
