"""Block-scaled formats in plain torch: what their codes stand for, and how to make them.

OCP MX v1.0: 32 neighbours along a row share one power of two, an e8m0 code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.kernels.params import MX_GROUP, MXWeight

# Magnitudes of e2m1 codes 0 to 7; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_MAX = 448.0
# Exponent of the largest magnitude of each format: a group is scaled so that its own largest comes there.
_MAX_EXPONENT = {"mxfp8": 8, "mxfp4": 2}


def dequantise(weight: MXWeight, dtype: torch.dtype) -> Tensor:
    """What `weight` stands for, [..., rows, columns] of `dtype`: the exact product, rounded once.

    bfloat16 holds every product from 2 ** -126 on, smaller ones may round; what overflows is infinite. NaN codes and
    NaN scales give NaN.
    """
    if weight.values.ndim > 2:
        # One matrix at a time: the float32 of a layer's experts would take several times its memory.
        out = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
        for i, part in enumerate(out):
            part.copy_(dequantise(MXWeight(weight.format, weight.values[i], weight.scales[i]), dtype))
        return out
    values = weight.values.view(torch.float8_e4m3fn).float() if weight.format == "mxfp8" else _e2m1(weight.values)
    groups = values.view(*weight.scales.shape, MX_GROUP) * e8m0(weight.scales).unsqueeze(-1)
    return groups.view(weight.shape).to(dtype)


def e8m0(codes: Tensor) -> Tensor:
    """uint8 -> float32, same shape: 2 ** (code - 127), NaN for 255."""
    bits = codes.to(torch.int32) << 23
    # 2 ** -127 is subnormal. Infinity's exponent becomes a NaN with a mantissa bit.
    bits = torch.where(codes == 0, 1 << 22, bits + ((codes == 255).to(torch.int32) << 22))
    return bits.view(torch.float32)


def _e2m1(packed: Tensor) -> Tensor:
    """uint8 [rows, columns / 2] -> float32 [rows, columns]."""
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def quantise(weight: Tensor, kind: Literal["mxfp8", "mxfp4"]) -> MXWeight:
    """weight: finite, [..., rows, columns], columns a multiple of 32. Rounds to nearest even, saturates.

    The scale of a group is the power of two that brings the leading bit of its largest value to the format's largest
    exponent, as the MX specification suggests.
    """
    groups = weight.float().reshape(*weight.shape[:-1], -1, MX_GROUP)
    largest = groups.abs().amax(-1)
    exponents = largest.view(torch.int32) >> 23
    scales = (exponents - _MAX_EXPONENT[kind]).clamp(0, 254).to(torch.uint8)
    values = (groups / e8m0(scales).unsqueeze(-1)).flatten(-2)
    if kind == "mxfp8":
        # Out of range the conversion would give NaN.
        codes = values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        return MXWeight(kind, codes, scales)
    magnitudes = values.abs()
    codes = torch.signbit(values).to(torch.uint8) << 3
    for code in range(1, 8):
        middle = (E2M1[code - 1] + E2M1[code]) / 2
        # Halfway, the even code wins.
        codes += magnitudes > middle if code % 2 else magnitudes >= middle
    return MXWeight(kind, codes[..., ::2] | (codes[..., 1::2] << 4), scales)
