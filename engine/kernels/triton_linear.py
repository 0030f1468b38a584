# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Linear layers of a few tokens, bound by reading the weight once; larger batches go to the vendor's GEMM, which on
H100 is as fast from 17 tokens on.

One token: multiply and reduce, every thread streams 16-byte pieces of the weight through registers. Up to 16: a matrix
product with the weight on the M side and the tokens, padded to a tile, on the N side (on
NVIDIA a tile of 64 weight rows thus uses wgmma whatever the number of tokens). There the order in which products are
summed over K does not depend on the number of tokens.

Weights of the MX formats (triton_mx.py) take the same kernels; their products of many tokens are here too, up to the
number from which it is faster to convert the whole weight for the vendor's GEMM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import configs, configs_mx
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import MX_GROUP, MXWeight, Weight
from engine.kernels.triton_common import follow, operand
from engine.kernels.triton_mx import Packed, PackedMX, dequantise, mx_dot, mx_row_products, pack, storage, tensors
from engine.kernels.triton_mx_decode import correction

# Fewer K elements than this per tile are no dot on any GPU.
_MIN_K = 16
# That one program multiplies with all of.
_FEW_TOKENS = 64


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
def from_row(weight, scales, row, K: tl.constexpr, FORMAT: tl.constexpr):
    """Pointers to what is stored of a weight with rows of K elements, from `row`, int64, on."""
    if FORMAT == "plain":
        return weight + row * K, weight  # Triton 3.6 cannot return None, and nobody looks at the second one
    else:
        return weight + row * (K // 2 if FORMAT == "mxfp4" else K), scales + row * (K // 32)


@triton.jit
def no_products(ROWS: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr):
    """What `row_products` adds to first."""
    return tl.zeros([ROWS, BLOCK_K // 2 if FORMAT == "mxfp4" else BLOCK_K], tl.float32)


@triton.jit
def sum_products(acc, FORMAT: tl.constexpr, DECODE: tl.constexpr):
    """What `row_products` is to be reduced to, [rows]."""
    if FORMAT == "plain":
        return tl.sum(acc, 1)
    else:
        return tl.sum(acc, 1) * correction(FORMAT, DECODE)


@triton.jit
def row_products(
    weight,
    scales,
    rows,
    x,
    scale,
    acc,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """acc + the products of weight rows with scale * x, [rows, any] fp32: still to be summed up, by `sum_products`.

    scales: of the MX formats, else anything.  x: [K].  acc: of `no_products`.  Unrolled, so that the loads of all
    chunks can be in flight together.  OVERLAP: the kernel's `follow` is here, behind the first loads of the weight.
    """
    if FORMAT == "plain":
        for chunk in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            columns = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
            tile = weight_tile(weight, rows, columns, K, EVEN_K, UPCAST)
            follow(OVERLAP and chunk == 0)
            values = tl.load(x + columns) if EVEN_K else tl.load(x + columns, mask=columns < K, other=0.0)
            acc += tile.to(tl.float32) * (values.to(tl.float32) * scale)[None, :]
        return acc
    else:
        return mx_row_products(weight, scales, rows, x, scale, acc, K, BLOCK_K, EVEN_K, FORMAT, DECODE, OVERLAP)


@triton.jit
def weight_dot(
    weight,
    scales,
    rows,
    x,
    tokens,
    valid,
    acc,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
):
    """acc + weight rows times token rows, [rows, tokens] fp32.

    scales, SPLIT: of the MX formats, else anything; acc is then 0.  tokens: row numbers of x, [num, K], those that are
    not `valid` read as 0.
    """
    if FORMAT == "plain":
        for start in range(0, K, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            tile = weight_tile(weight, rows, columns, K, EVEN_K, UPCAST)
            inside = valid[:, None] if EVEN_K else valid[:, None] & (columns < K)[None, :]
            values = operand(tl.load(x + tokens[:, None] * K + columns[None, :], mask=inside, other=0.0), UPCAST)
            acc = tl.dot(tile, tl.trans(values), acc, input_precision="ieee")
        return acc
    else:
        return mx_dot(weight, scales, rows, x, tokens, valid, K, BLOCK_K, SPLIT, FORMAT, DECODE, UPCAST)


@triton.jit
def _one_token_kernel(
    x,
    weight,
    scales,
    out,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    index = tl.arange(0, BLOCK_N)
    rows = tl.minimum(index, N - 1 - start)
    weight, scales = from_row(weight, scales, start.to(tl.int64), K, FORMAT)
    acc = no_products(BLOCK_N, BLOCK_K, FORMAT)
    acc = row_products(weight, scales, rows, x, 1.0, acc, K, BLOCK_K, EVEN_K, UPCAST, FORMAT, DECODE, OVERLAP)
    tl.store(out + start + index, sum_products(acc, FORMAT, DECODE).to(out.dtype.element_ty), mask=start + index < N)


@triton.jit
def _few_tokens_kernel(
    x,
    weight,
    scales,
    out,
    num_tokens,
    N,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    start = tl.program_id(0) * BLOCK_N
    index, tokens = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    rows = tl.minimum(index, N - 1 - start)
    weight, scales = from_row(weight, scales, start.to(tl.int64), K, FORMAT)
    valid = tokens < num_tokens
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc = weight_dot(weight, scales, rows, x, tokens, valid, acc, K, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE)
    out += start
    inside = valid[None, :] & (start + index < N)[:, None]
    tl.store(out + tokens[None, :] * N + index[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _many_tokens_kernel(
    x,
    weight,
    scales,
    out,
    num_tokens,
    N,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Program (tile of BLOCK_N outputs, tile of BLOCK_T tokens): neighbours share the tokens."""
    start, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_T
    index, tokens = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    rows = tl.minimum(index, N - 1 - start)
    weight, scales = from_row(weight, scales, start.to(tl.int64), K, FORMAT)
    x += first.to(tl.int64) * K
    valid = first + tokens < num_tokens
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc = weight_dot(weight, scales, rows, x, tokens, valid, acc, K, BLOCK_K, SPLIT, EVEN_K, UPCAST, FORMAT, DECODE)
    out += first.to(tl.int64) * N + start
    inside = valid[None, :] & (start + index < N)[:, None]
    tl.store(out + tokens[None, :] * N + index[:, None], acc.to(out.dtype.element_ty), mask=inside)


def pack_linear(target: Target, weight: Weight) -> Packed:
    """Prepare a weight for `linear`. weight: [out, in]; the result has the same shape."""
    return pack(target, weight) if isinstance(weight, MXWeight) else weight.contiguous()


def linear(target: Target, x: Tensor, packed: Packed) -> Tensor:
    """See torch_linear.linear."""
    num_tokens = x.shape[0]
    # fp32 is for parity tests, where the vendor's exact GEMM is good enough.
    ours = x.dtype is not torch.float32 or target.interpreted
    if isinstance(packed, PackedMX):
        most = configs_mx.LINEAR_MAX_TOKENS[target.arch]
    else:
        most = configs.LINEAR_MAX_TOKENS[target.arch]
    if not ours or not 0 < num_tokens <= most:
        return F.linear(x, dequantise(target, packed, x.dtype) if isinstance(packed, PackedMX) else packed)
    x = x.contiguous()
    size = packed.shape[0]
    out = x.new_empty(num_tokens, size)
    config = _config(target, packed, num_tokens)
    grid = (triton.cdiv(size, config["BLOCK_N"]),)
    weight, scales = tensors(packed)
    if multiplies_rows(packed, num_tokens):
        tiles = inner_products(target, packed, config)
        config = one_token_config(target, config, packed, tiles["BLOCK_K"])
        arguments = (x, weight, scales, out, size)
        target.launch(_one_token_kernel, grid, *arguments, config=config, OVERLAP=target.overlaps, **tiles)
        return out
    tiles = inner_dot(target, packed, config)
    some = (x, weight, scales, out, num_tokens, size)
    if num_tokens <= _FEW_TOKENS:
        block_t = max(16, triton.next_power_of_2(num_tokens))
        tiles |= {"BLOCK_T": block_t, "OVERLAP": target.overlaps}
        target.launch(_few_tokens_kernel, grid, *some, config=config, **tiles)
    else:
        tiles_t = triton.cdiv(num_tokens, config["BLOCK_T"])
        target.launch(_many_tokens_kernel, (*grid, tiles_t), *some, config=config, **tiles)
    return out


def inner_sum(target: Target, weight: Packed, config: LaunchConfig) -> dict[str, Any]:
    """Constexprs about a sum over the columns of `weight`."""
    width, least = weight.shape[-1], _MIN_K if isinstance(weight, Tensor) else MX_GROUP
    part = width // config.tiles.get("SPLIT", 1)
    # The largest power of two that divides the width: tiles without a ragged end need no masks.
    block_k = min(config["BLOCK_K"], max(least, part & -part))
    return {"K": width, "BLOCK_K": block_k, "EVEN_K": width % block_k == 0, "UPCAST": target.interpreted}


def inner_products(target: Target, weight: Packed, config: LaunchConfig) -> dict[str, Any]:
    """Constexprs of `row_products`."""
    tiles = inner_sum(target, weight, config)
    if isinstance(weight, PackedMX):
        # Rather a ragged end than too few columns for the threads of a warp.
        enough = min(config["BLOCK_K"], triton.next_power_of_2(tiles["K"]), 8 * target.warp * weight.per_byte)
        tiles["BLOCK_K"] = max(tiles["BLOCK_K"], enough)
        tiles["EVEN_K"] = tiles["K"] % tiles["BLOCK_K"] == 0
    return tiles | storage(weight)


def inner_dot(target: Target, weight: Packed, config: LaunchConfig) -> dict[str, Any]:
    """Constexprs of `weight_dot`."""
    if config.tiles.get("SPLIT", 1) > 1 and weight.shape[-1] % (MX_GROUP * config["SPLIT"]):
        config = replace(config, tiles={**config.tiles, "SPLIT": 1})
    split = config.tiles.get("SPLIT", 1)
    return inner_sum(target, weight, config) | storage(weight, config) | {"SPLIT": split}


def one_token_config(target: Target, config: LaunchConfig, weight: Packed, block_k: int) -> LaunchConfig:
    """`config` with as many warps as one row of BLOCK_K takes, at 8 elements (16 bytes), or 8 bytes of an MX format, a
    thread. Then x is loaded in the very layout that the products need; with more warps, each chunk of it would pass
    through shared memory."""
    elements = 8 if isinstance(weight, Tensor) else 8 * weight.per_byte
    return replace(config, num_warps=max(1, block_k // (elements * target.warp)))


def multiplies_rows(weight: Packed, num_tokens: int) -> bool:
    """Whether `row_products` takes it: one token, and a weight that is decoded without a matrix product."""
    return num_tokens == 1 and (isinstance(weight, Tensor) or weight.decoding != "scaled")


def _config(target: Target, weight: Packed, num_tokens: int) -> LaunchConfig:
    if isinstance(weight, PackedMX):
        if multiplies_rows(weight, num_tokens):
            tables = configs_mx.LINEAR_ONE
        elif num_tokens <= _FEW_TOKENS:
            tables = configs_mx.LINEAR_16 if num_tokens <= 16 else configs_mx.LINEAR_64
        else:
            tables = configs_mx.LINEAR_MANY
        return tables[weight.format][target.arch]
    if num_tokens == 1:
        return configs.LINEAR_ONE[target.arch]
    # With many rows a wide tile still covers the GPU, and reads the tokens less often.
    return (configs.LINEAR_16_WIDE if weight.shape[0] >= 16384 else configs.LINEAR_16)[target.arch]
