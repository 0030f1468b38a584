# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Tiles of weights of the MX formats, decoded in registers. triton_mx.py says how they are stored."""

from __future__ import annotations

import triton
import triton.language as tl

# Two codes at a time. `prmt` puts each into the low byte of its half of a register and its sign all over the high byte;
# after a shift, a mask leaves the sign and the exponent and mantissa of a bf16. Then times the scale.
_PTX_E4M3 = """
prmt.b32 p, {codes}, 0, {bytes};
shl.b32 p, p, 4;
and.b32 p, p, 0x87F087F0;
mul.bf16x2 {out}, p, {scale};
"""
# The code in the high four bits of each byte.
_PTX_E2M1 = """
prmt.b32 p, {codes}, 0, {bytes};
shl.b32 p, p, 2;
and.b32 p, p, 0x81C081C0;
mul.bf16x2 {out}, p, {scale};
"""
_FIRST, _SECOND = "0x9180", "0xB3A2"
_E4M3_BY_2 = tl.constexpr(
    "{ .reg .b32 p, w; cvt.u32.u16 w, $1;" + _PTX_E4M3.format(codes="w", bytes=_FIRST, out="$0", scale="$2") + "}"
)
_E4M3_BY_4 = tl.constexpr(
    "{ .reg .b32 p;"
    + _PTX_E4M3.format(codes="$2", bytes=_FIRST, out="$0", scale="$3")
    + _PTX_E4M3.format(codes="$2", bytes=_SECOND, out="$1", scale="$5")
    + "}"
)
_E2M1_BY_4 = tl.constexpr(
    "{ .reg .b32 p, l; shl.b32 l, $4, 4;"
    + _PTX_E2M1.format(codes="l", bytes=_FIRST, out="$0", scale="$5")
    + _PTX_E2M1.format(codes="l", bytes=_SECOND, out="$1", scale="$7")
    + _PTX_E2M1.format(codes="$4", bytes=_FIRST, out="$2", scale="$5")
    + _PTX_E2M1.format(codes="$4", bytes=_SECOND, out="$3", scale="$7")
    + "}"
)
# The same as float32.
_PTX_FLOATS = "shl.b32 {low}, {pair}, 16; and.b32 {high}, {pair}, 0xFFFF0000;"
_E4M3_FLOATS = tl.constexpr(
    "{ .reg .b32 p, q;"
    + _PTX_E4M3.format(codes="$4", bytes=_FIRST, out="q", scale="$5")
    + _PTX_FLOATS.format(pair="q", low="$0", high="$1")
    + _PTX_E4M3.format(codes="$4", bytes=_SECOND, out="q", scale="$7")
    + _PTX_FLOATS.format(pair="q", low="$2", high="$3")
    + "}"
)
_E2M1_FLOATS = tl.constexpr(
    "{ .reg .b32 p, q, l; shl.b32 l, $8, 4;"
    + _PTX_E2M1.format(codes="l", bytes=_FIRST, out="q", scale="$9")
    + _PTX_FLOATS.format(pair="q", low="$0", high="$1")
    + _PTX_E2M1.format(codes="l", bytes=_SECOND, out="q", scale="$11")
    + _PTX_FLOATS.format(pair="q", low="$2", high="$3")
    + _PTX_E2M1.format(codes="$8", bytes=_FIRST, out="q", scale="$9")
    + _PTX_FLOATS.format(pair="q", low="$4", high="$5")
    + _PTX_E2M1.format(codes="$8", bytes=_SECOND, out="q", scale="$11")
    + _PTX_FLOATS.format(pair="q", low="$6", high="$7")
    + "}"
)


@triton.jit
def _spread(scale, WIDTH: tl.constexpr):
    """[(parts,) rows, groups] -> [(parts,) rows, groups * WIDTH], each scale WIDTH times."""
    ROWS: tl.constexpr = scale.shape[-2]
    GROUPS: tl.constexpr = scale.shape[-1]
    if len(scale.shape) == 2:
        return tl.reshape(tl.broadcast_to(scale[:, :, None], [ROWS, GROUPS, WIDTH]), [ROWS, GROUPS * WIDTH])
    else:
        PARTS: tl.constexpr = scale.shape[0]
        spread = tl.broadcast_to(scale[:, :, :, None], [PARTS, ROWS, GROUPS, WIDTH])
        return tl.reshape(spread, [PARTS, ROWS, GROUPS * WIDTH])


@triton.jit
def _exact(tile, FLOAT: tl.constexpr):
    """float32 of at most 8 significant bits -> bf16."""
    if FLOAT:
        return tile
    else:
        return (tile.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _float_scale(scale, WIDTH: tl.constexpr):
    return _spread((scale.to(tl.uint32) << 23).to(tl.float32, bitcast=True), WIDTH)


@triton.jit
def e4m3_tile(codes, scale, DECODE: tl.constexpr, FLOAT: tl.constexpr):
    """bf16, or with FLOAT float32, [rows, columns], of codes of that shape and scales [rows, groups]; to be multiplied
    by correction(). "asm2" makes no float32."""
    WIDTH: tl.constexpr = codes.shape[-1] // scale.shape[-1]
    if DECODE == "asm2":
        spread = _spread(scale.to(tl.int32) * 0x00800080, WIDTH)
        return tl.inline_asm_elementwise(_E4M3_BY_2, "=r,h,r,r", [codes, spread], tl.bfloat16, is_pure=True, pack=2)
    elif DECODE == "asm4":
        spread = _spread(scale.to(tl.int32) * 0x00800080, WIDTH)
        if FLOAT:
            return tl.inline_asm_elementwise(
                _E4M3_FLOATS, "=f,=f,=f,=f,r,r,r,r,r", [codes, spread], tl.float32, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                _E4M3_BY_4, "=r,=r,r,r,r,r,r", [codes, spread], tl.bfloat16, is_pure=True, pack=4
            )
    elif DECODE == "float":
        return _exact(codes.to(tl.float8e4b8, bitcast=True).to(tl.float32) * _float_scale(scale, WIDTH), FLOAT)
    else:
        return _exact(codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * _float_scale(scale, WIDTH), FLOAT)


@triton.jit
def e2m1_tiles(codes, scale, DECODE: tl.constexpr, FLOAT: tl.constexpr):
    """As e4m3_tile, of the codes in the low and in the high bits: two tiles [rows, bytes]."""
    WIDTH: tl.constexpr = codes.shape[-1] // scale.shape[-1]
    if DECODE == "asm4":
        spread = _spread(scale.to(tl.int32) * 0x00800080, WIDTH)
        if FLOAT:
            return tl.inline_asm_elementwise(
                _E2M1_FLOATS,
                "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r",
                [codes, spread],
                (tl.float32, tl.float32),
                is_pure=True,
                pack=4,
            )
        else:
            return tl.inline_asm_elementwise(
                _E2M1_BY_4, "=r,=r,=r,=r,r,r,r,r,r", [codes, spread], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
    else:
        bits = codes.to(tl.uint32)
        low = (((bits & 0x08) << 28) | ((bits & 0x07) << 22)).to(tl.float32, bitcast=True)
        high = (((bits & 0x80) << 24) | ((bits & 0x70) << 18)).to(tl.float32, bitcast=True)
        if DECODE == "scaled":
            low, high = low * 2.0**126, high * 2.0**126
        spread = _float_scale(scale, WIDTH)
        return _exact(low * spread, FLOAT), _exact(high * spread, FLOAT)


@triton.jit
def correction(FORMAT: tl.constexpr, DECODE: tl.constexpr):
    """What sums of products with decoded tiles are multiplied by."""
    if FORMAT == "plain" or DECODE == "scaled":
        return 1.0
    elif DECODE == "float" and FORMAT == "mxfp8":
        return 2.0
    else:
        return 2.0**60
