# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Weights of the MX formats: how they are packed for each architecture, and how kernels multiply with them.

Bytes and scales stay packed in memory; a kernel turns a tile of them into bf16 in registers, exactly, and multiplies as
with any other weight. How it does that is the weight's decoding:

- "asm" (NVIDIA): the bits of two codes at a time become two bf16, whose exponents one multiplication by the scale puts
  right. The conversion instructions of the hardware are several times slower.
- "float" (gfx942, and Triton's interpreter): as float32, by the conversion from the fnuz encoding of e4m3, or from the
  bits of e2m1; the product with the scale has so few bits that cutting it to bf16 is exact.
- "scaled" (gfx950): by the hardware's own conversions with a scale, behind tl.dot_scaled.

"asm", and "float" for e2m1, take bits that stand for a value times 2 ** -120 or 2 ** -126 for the value: a bias in
the stored scales and a factor on the sums, 2 ** 60, make up for it. Weights below about 2 ** -70 thus vanish, and
those of 2 ** 60 and more, or with NaN for a scale, become infinite or NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs_mx
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import MX_GROUP, MXWeight
from engine.kernels.triton_common import follow, operand
from engine.kernels.triton_mx_decode import correction, e2m1_tiles, e4m3_tile

# Added to the scales, by (decoding, format), and taken back by the factors of `correction`.
_BIAS = {("asm", "mxfp8"): 60, ("asm", "mxfp4"): 66, ("float", "mxfp4"): 66}


@dataclass(frozen=True, slots=True)
class PackedMX:
    """An MXWeight as the kernels of one architecture read it.

    values: uint8 [..., rows, bytes]. Codes of "float" are fnuz where they are e4m3.  Of e2m1, unless "scaled", byte j
    of the 16 of a group holds column j in its low bits and column 16 + j in the high ones.
    scales: uint8 [..., rows, columns / 32], with the bias of the decoding.
    """

    format: str
    decoding: str
    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., rows, columns] of the weight."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * MX_GROUP)

    @property
    def per_byte(self) -> int:
        """Columns in a byte."""
        return 2 if self.format == "mxfp4" else 1


Packed = Tensor | PackedMX


def pack(target: Target, weight: MXWeight) -> PackedMX:
    """`weight` as this architecture wants it; the copy takes as much memory."""
    decoding = configs_mx.DECODING[target.arch]
    values, scales = weight.values.contiguous(), weight.scales.contiguous()
    if bias := _BIAS.get((decoding, weight.format), 0):
        scales = scales.clamp(max=255 - bias) + bias
    if decoding != "scaled" and weight.format == "mxfp4":
        values = _by_matrix(_halves, values)
    if decoding == "float" and weight.format == "mxfp8":
        values = _by_matrix(_fnuz, values)
    return PackedMX(weight.format, decoding, values, scales)


def _by_matrix(change: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """change(values), one matrix at a time: what it needs besides stays small."""
    matrices = values.view(-1, *values.shape[-2:])
    out = torch.empty_like(matrices)
    for each, result in zip(matrices, out, strict=True):
        result.copy_(change(each))
    return out.view(values.shape)


def _halves(values: Tensor) -> Tensor:
    """From pairs of columns in a byte to columns j and 16 + j of a group."""
    groups = torch.stack((values & 15, values >> 4), -1).view(*values.shape[:-1], -1, MX_GROUP)
    return (groups[..., :16] | groups[..., 16:] << 4).view(values.shape)


def _fnuz(values: Tensor) -> Tensor:
    """e4m3fn codes as e4m3fnuz ones of half the value, but for -0 and NaN the bits are the same."""
    return torch.where(values == 0x80, 0, torch.where(values & 0x7F == 0x7F, 0x80, values)).to(torch.uint8)


def storage(weight: Packed, config: LaunchConfig | None = None) -> dict[str, str]:
    """Constexprs that say how `weight` is stored. config: of a kernel that multiplies it by tl.dot."""
    if isinstance(weight, Tensor):
        return {"FORMAT": "plain", "DECODE": ""}
    decoding = weight.decoding
    if decoding == "asm":
        # In the layout of wgmma, which mxfp4 keeps off (configs_mx.py), a thread has two neighbouring columns of a row,
        # in the other ones at least four.
        wgmma = config is not None and config.num_warps % 4 == 0 and config.tiles.get("SPLIT", 1) == 1
        decoding = "asm2" if wgmma and weight.format == "mxfp8" else "asm4"
    return {"FORMAT": weight.format, "DECODE": decoding}


def tensors(weight: Packed) -> tuple[Tensor, Tensor | None]:
    """(values, scales), the latter None for a plain weight."""
    return (weight, None) if isinstance(weight, Tensor) else (weight.values, weight.scales)


@triton.jit
def _columns_first(tile):
    """[(parts,) tokens, columns] -> [(parts,) columns, tokens]."""
    if len(tile.shape) == 2:
        return tl.trans(tile)
    else:
        return tl.permute(tile, [0, 2, 1])


@triton.jit
def mx_row_products(
    values,
    scales,
    rows,
    x,
    scale,
    acc,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """acc + the products of weight rows with scale * x, fp32 [rows, any number that sums to the result].

    x: [K].  acc: [rows, BLOCK_K], of mxfp4 half as wide; still to be multiplied by correction().  Not for "scaled".
    A thread takes eight bytes at a time: their inputs and their scale are then loaded by the very thread, and nothing
    passes through shared memory.
    """
    FOUR: tl.constexpr = FORMAT == "mxfp4"
    BYTES: tl.constexpr = 16 if FOUR else 32
    GROUPS: tl.constexpr = BLOCK_K // 32
    ROWS: tl.constexpr = rows.shape[0]
    EIGHTS: tl.constexpr = GROUPS * BYTES // 8
    # The hint is for this range alone.
    byte, index = tl.max_contiguous(tl.arange(0, GROUPS * BYTES), 8), tl.arange(0, GROUPS * BYTES)
    column = index // 16 * 32 + index % 16 if FOUR else index
    eight = tl.arange(0, EIGHTS)
    for chunk in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        first = chunk * GROUPS
        codes_at = values + rows[:, None] * (K // 32 * BYTES) + (first * BYTES + byte)[None, :]
        # One dimension: of two, Triton 3.6 gives neighbouring rows to neighbouring threads.
        scales_at = scales + rows[:, None] * (K // 32) + (first + eight // (BYTES // 8))[None, :]
        if EVEN_K:
            codes = tl.load(codes_at, eviction_policy="evict_first")
            exponents = tl.reshape(tl.load(tl.reshape(scales_at, [ROWS * EIGHTS])), [ROWS, EIGHTS])
        else:
            codes = tl.load(codes_at, mask=(first * 32 + column < K)[None, :], other=0, eviction_policy="evict_first")
            present = tl.broadcast_to((first + eight // (BYTES // 8) < K // 32)[None, :], [ROWS, EIGHTS])
            exponents = tl.load(
                tl.reshape(scales_at, [ROWS * EIGHTS]), mask=tl.reshape(present, [ROWS * EIGHTS]), other=0
            )
            exponents = tl.reshape(exponents, [ROWS, EIGHTS])
        follow(OVERLAP and chunk == 0)
        columns = first * 32 + column
        if FOUR:
            low, high = e2m1_tiles(codes, exponents, DECODE, True)
            acc += low * _inputs(x, columns, scale, K, EVEN_K)[None, :]
            acc += high * _inputs(x, columns + 16, scale, K, EVEN_K)[None, :]
        else:
            weight = e4m3_tile(codes, exponents, DECODE, True)
            acc += weight * _inputs(x, columns, scale, K, EVEN_K)[None, :]
    return acc


@triton.jit
def _inputs(x, columns, scale, K: tl.constexpr, EVEN_K: tl.constexpr):
    """scale * x at `columns`, float32; x is [K]."""
    values = tl.load(x + columns) if EVEN_K else tl.load(x + columns, mask=columns < K, other=0.0)
    return values.to(tl.float32) * scale


@triton.jit
def mx_dot(
    values,
    scales,
    rows,
    x,
    tokens,
    valid,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weight rows times token rows, [rows, tokens] fp32.

    tokens: row numbers of x, [num, K], those that are not `valid` read as 0.  SPLIT: how many parts of K are summed
    side by side, each by some of the warps; BLOCK_K is of one.
    """
    FOUR: tl.constexpr = FORMAT == "mxfp4"
    BYTES: tl.constexpr = 16 if FOUR else 32
    GROUPS: tl.constexpr = BLOCK_K // 32
    PART: tl.constexpr = K // 32 // SPLIT
    ROWS: tl.constexpr = rows.shape[0]
    TOKENS: tl.constexpr = tokens.shape[0]
    byte, group, column = tl.arange(0, GROUPS * BYTES), tl.arange(0, GROUPS), tl.arange(0, BLOCK_K)
    half = byte // 16 * 32 + byte % 16
    if SPLIT == 1:
        codes_at = values + rows[:, None] * (K // 32 * BYTES) + byte[None, :]
        scales_at = scales + rows[:, None] * (K // 32) + group[None, :]
        x_at, present = x + tokens[:, None] * K, valid[:, None]
        column, half = column[None, :], half[None, :]
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
    else:
        part = tl.arange(0, SPLIT)[:, None, None] * PART
        codes_at = values + rows[None, :, None] * (K // 32 * BYTES) + (part * BYTES + byte[None, None, :])
        scales_at = scales + rows[None, :, None] * (K // 32) + (part + group[None, None, :])
        x_at, present = x + tokens[None, :, None] * K + part * 32, valid[None, :, None]
        column, half = column[None, None, :], half[None, None, :]
        acc = tl.zeros([SPLIT, ROWS, TOKENS], tl.float32)
    for first in range(0, PART, GROUPS):
        codes = tl.load(codes_at + first * BYTES, eviction_policy="evict_first")
        scale = tl.load(scales_at + first)
        inputs = x_at + first * 32
        if DECODE == "scaled":
            tile = tl.trans(tl.load(inputs + column, mask=present, other=0.0))
            if FOUR:
                acc = tl.dot_scaled(codes, scale, "e2m1", tile, None, "bf16", acc, fast_math=True)
            else:
                acc = tl.dot_scaled(codes, scale, "e4m3", tile, None, "bf16", acc, fast_math=True)
        elif FOUR:
            low, high = e2m1_tiles(codes, scale, DECODE, UPCAST)
            left = operand(tl.load(inputs + half, mask=present, other=0.0), UPCAST)
            right = operand(tl.load(inputs + (16 + half), mask=present, other=0.0), UPCAST)
            acc = tl.dot(low, _columns_first(left), acc, input_precision="ieee")
            acc = tl.dot(high, _columns_first(right), acc, input_precision="ieee")
        else:
            tile = operand(tl.load(inputs + column, mask=present, other=0.0), UPCAST)
            weight = e4m3_tile(codes, scale, DECODE, UPCAST)
            acc = tl.dot(weight, _columns_first(tile), acc, input_precision="ieee")
    if SPLIT > 1:
        acc = tl.sum(acc, 0)
    return acc * correction(FORMAT, DECODE)


@triton.jit
def _dequantise_kernel(
    values,
    scales,
    out,
    num_rows,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Program (tile of BLOCK_N rows, tile of BLOCK_K columns). out: [num_rows, K]."""
    FOUR: tl.constexpr = FORMAT == "mxfp4"
    BYTES: tl.constexpr = 16 if FOUR else 32
    GROUPS: tl.constexpr = BLOCK_K // 32
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    first = tl.program_id(1) * GROUPS
    inside = rows < num_rows
    byte = tl.arange(0, GROUPS * BYTES)
    codes = tl.load(values + rows * (K // 32 * BYTES) + (first * BYTES + byte)[None, :], mask=inside, other=0)
    scale = tl.load(scales + rows * (K // 32) + (first + tl.arange(0, GROUPS))[None, :], mask=inside, other=0)
    out += rows * K + first * 32
    if FOUR:
        low, high = e2m1_tiles(codes, scale, DECODE, True)
        factor = correction(FORMAT, DECODE)
        low, high = (low * factor).to(out.dtype.element_ty), (high * factor).to(out.dtype.element_ty)
        if DECODE == "scaled":
            tl.store(out + tl.arange(0, BLOCK_K)[None, :], tl.interleave(low, high), mask=inside)
        else:
            columns = (byte // 16 * 32 + byte % 16)[None, :]
            tl.store(out + columns, low, mask=inside)
            tl.store(out + columns + 16, high, mask=inside)
    else:
        tile = e4m3_tile(codes, scale, DECODE, True) * correction(FORMAT, DECODE)
        tl.store(out + byte[None, :], tile.to(out.dtype.element_ty), mask=inside)


def dequantise(target: Target, weight: PackedMX, dtype: torch.dtype) -> Tensor:
    """The whole weight, [..., rows, columns] of `dtype`."""
    width = weight.shape[-1]
    out = weight.values.new_empty(weight.shape, dtype=dtype)
    config = configs_mx.DEQUANTISE[target.arch]
    block_k = mx_k_tile(width, config["BLOCK_K"])
    num_rows = weight.scales.numel() * MX_GROUP // width
    target.launch(
        _dequantise_kernel,
        (triton.cdiv(num_rows, config["BLOCK_N"]), width // block_k),
        *(weight.values, weight.scales, out, num_rows),
        config=config,
        K=width,
        BLOCK_K=block_k,
        **storage(weight),
    )
    return out


def mx_k_tile(width: int, limit: int) -> int:
    """The largest power of two that divides `width`, up to `limit`."""
    return min(limit, width & -width)
