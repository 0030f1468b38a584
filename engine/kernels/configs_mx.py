"""Launch configurations of the kernels for weights of the MX formats, as configs.py; by format where tiles differ: the
columns of a tile take half as many bytes in mxfp4."""

from __future__ import annotations

from dataclasses import replace

from engine.kernels.configs import Table
from engine.kernels.launch import GFX942, GFX950, INTERPRET, SM90, LaunchConfig

_MFMA16 = {"matrix_instr_nonkdim": 16}
ByFormat = dict[str, Table]
# Of w13 and of w2.
PairByFormat = dict[str, tuple[Table, Table]]

# How weights are decoded (triton_mx.py).
DECODING = {SM90: "asm", GFX942: "float", GFX950: "scaled", INTERPRET: "float"}


def _table(sm90: LaunchConfig, gfx942: LaunchConfig, gfx950: LaunchConfig, interpret: LaunchConfig) -> Table:
    return {
        SM90: sm90,
        GFX942: replace(gfx942, hip=_MFMA16),
        GFX950: replace(gfx950, hip=_MFMA16),
        INTERPRET: interpret,
    }


# --- One token: multiply and reduce. gfx950 has none: it decodes in matrix products only ---


def _one(n: int, k: int, amd_n: int, amd_k: int) -> Table:
    return {
        SM90: LaunchConfig({"BLOCK_N": n, "BLOCK_K": k}, num_stages=1),
        GFX942: LaunchConfig({"BLOCK_N": amd_n, "BLOCK_K": amd_k}, num_stages=1),
        INTERPRET: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 64}),
    }


LINEAR_ONE: ByFormat = {"mxfp8": _one(4, 1024, 4, 2048), "mxfp4": _one(4, 2048, 2, 2048)}
MOE_ONE_GATE_UP: ByFormat = {"mxfp8": _one(1, 2048, 2, 2048), "mxfp4": _one(1, 1024, 2, 2048)}
MOE_ONE_DOWN: ByFormat = {"mxfp8": _one(2, 1024, 2, 1024), "mxfp4": _one(4, 1024, 2, 1024)}


# --- Few tokens. SPLIT: parts of a sum that the warps of a program add up side by side ---


def _few(n: int, k: int, split: int, warps: int, stages: int) -> LaunchConfig:
    return LaunchConfig({"BLOCK_N": n, "BLOCK_K": k, "SPLIT": split}, warps, stages)


def _narrow(table: Table) -> Table:
    """Of experts: those of no more tokens than NARROW use a tile of that many, the least that matrix units take."""
    return {
        arch: replace(config, tiles={**config.tiles, "NARROW": 8 if arch == SM90 else 16})
        for arch, config in table.items()
    }


LINEAR_16: ByFormat = dict.fromkeys(
    ("mxfp8", "mxfp4"),
    _table(_few(16, 128, 4, 4, 4), _few(16, 64, 4, 4, 2), _few(16, 256, 1, 4, 2), _few(32, 32, 2, 4, 2)),
)
LINEAR_64: ByFormat = dict.fromkeys(
    ("mxfp8", "mxfp4"),
    _table(_few(32, 64, 4, 4, 3), _few(16, 128, 4, 4, 1), _few(16, 256, 1, 4, 2), _few(32, 32, 2, 4, 2)),
)
_AMD_MOE = _few(64, 128, 1, 4, 2)
_INTERPRET_MOE = _few(32, 32, 1, 4, 2)
MOE_16: PairByFormat = {
    "mxfp8": (
        _narrow(_table(_few(32, 128, 4, 4, 4), _AMD_MOE, _AMD_MOE, _INTERPRET_MOE)),
        _narrow(_table(_few(64, 256, 1, 2, 2), _AMD_MOE, _AMD_MOE, _INTERPRET_MOE)),
    ),
    "mxfp4": (
        _narrow(_table(_few(32, 256, 2, 2, 3), _AMD_MOE, _few(64, 256, 1, 4, 2), _INTERPRET_MOE)),
        _narrow(_table(_few(64, 128, 1, 2, 4), _AMD_MOE, _few(64, 256, 1, 4, 2), _INTERPRET_MOE)),
    ),
}
_MOE_64_DOWN = _narrow(_table(_few(64, 256, 1, 2, 2), _AMD_MOE, _AMD_MOE, _INTERPRET_MOE))
MOE_64: PairByFormat = {
    "mxfp8": (_narrow(_table(_few(32, 128, 4, 4, 3), _AMD_MOE, _AMD_MOE, _INTERPRET_MOE)), _MOE_64_DOWN),
    "mxfp4": (_narrow(_table(_few(64, 256, 1, 2, 2), _AMD_MOE, _AMD_MOE, _INTERPRET_MOE)), _MOE_64_DOWN),
}


# --- Many tokens: tiles of BLOCK_M pairs, or BLOCK_T tokens, on the N side of the products ---


def _many(m: int, n: int, k: int, warps: int, stages: int) -> LaunchConfig:
    return LaunchConfig({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, warps, stages)


def _tokens(config: LaunchConfig) -> LaunchConfig:
    tiles = {"BLOCK_T": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"], "BLOCK_K": config["BLOCK_K"]}
    return replace(config, tiles=tiles)


_INTERPRET_MANY = replace(_many(16, 64, 32, 4, 2), tiles={**_many(16, 64, 32, 4, 2).tiles, "GROUP_M": 2})


def _both(sm90: LaunchConfig, amd: LaunchConfig) -> Table:
    return _table(sm90, amd, amd, _INTERPRET_MANY)


# mxfp4 on sm_90 keeps to two warps, that is to mma.sync: its two wgmma a turn, both with an operand in registers, were
# seen to give wrong sums in the first calls of a process (Triton 3.6).
_SHORT_8 = _both(_many(32, 64, 128, 4, 3), _many(64, 64, 128, 4, 2))
_SHORT_4 = _both(_many(32, 64, 128, 2, 3), _many(64, 64, 128, 4, 2))
_LONG_8 = _both(_many(256, 128, 64, 8, 3), _many(128, 128, 64, 8, 2))
_LONG_4 = _both(_many(64, 128, 64, 2, 3), _many(128, 128, 64, 8, 2))
# Few pairs per expert: bound by the weights.
MOE_SHORT: PairByFormat = {"mxfp8": (_SHORT_8, _SHORT_8), "mxfp4": (_SHORT_4, _SHORT_4)}
MOE_MANY: PairByFormat = {"mxfp8": (_LONG_8, _LONG_8), "mxfp4": (_LONG_4, _LONG_4)}
_LINEAR_MANY_8 = _both(_many(64, 64, 128, 4, 3), _many(64, 64, 128, 4, 2))
LINEAR_MANY: ByFormat = {
    "mxfp8": {arch: _tokens(config) for arch, config in _LINEAR_MANY_8.items()},
    "mxfp4": {arch: _tokens(config) for arch, config in _SHORT_4.items()},
}
# From more tokens on, the weight is converted for the vendor's GEMM.
LINEAR_MAX_TOKENS: dict[str, int] = {SM90: 256, GFX942: 256, GFX950: 256, INTERPRET: 96}
DEQUANTISE: Table = {
    SM90: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 256}),
    GFX942: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 256}),
    GFX950: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 256}),
    INTERPRET: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 64}),
}
