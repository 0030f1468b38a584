"""Launch configurations: one table for all operations and architectures.

NVIDIA's are measured on H100; AMD's are chosen from ahead-of-time compilation (registers, spills, LDS) and have not
run on hardware. INTERPRET is Triton's interpreter on CPU, where only correctness counts.
"""

from __future__ import annotations

from dataclasses import replace

from engine.kernels.launch import GFX942, GFX950, INTERPRET, SM90, LaunchConfig

Table = dict[str, LaunchConfig]


# The first kernel of a captured decode step: one program per row.
PREPARE: Table = dict.fromkeys((SM90, GFX942, GFX950, INTERPRET), LaunchConfig({"CHUNK": 1024}, num_warps=4))

# Attention of decode rows. BLOCK_N: keys per step of a program; it divides 128.
_MFMA16 = {"matrix_instr_nonkdim": 16}
SPARSE_DECODE: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=5),
    GFX942: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_N": 128}),
}
# With so few rows that one block per program leaves units idle.
SPARSE_DECODE_SMALL: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=2),
    GFX942: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_N": 64}),
}
DENSE_DECODE: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=5),
    GFX942: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_N": 128}),
}
SPARSE_DECODE_FP8: Table = {
    SM90: LaunchConfig({"BLOCK_N": 128}, num_warps=4, num_stages=2),
    GFX942: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_N": 128}),
}
DENSE_DECODE_FP8: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=5),
    GFX942: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_N": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_N": 128}),
}
DECODE_FLOAT32: Table = {
    SM90: LaunchConfig({"BLOCK_N": 16}, num_warps=4, num_stages=1),
    GFX942: LaunchConfig({"BLOCK_N": 32}, num_warps=4, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_N": 32}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_N": 128}),
}
# (programs per unit, most splits of a row): how finely the keys of a row are split.
SPARSE_DECODE_PROGRAMS = {SM90: (1, 32), GFX942: (4, 16), GFX950: (4, 16), INTERPRET: (4, 4)}
SPARSE_DECODE_FP8_PROGRAMS = {SM90: (2, 32), GFX942: (4, 16), GFX950: (4, 16), INTERPRET: (4, 4)}
DENSE_DECODE_PROGRAMS = {SM90: (2, 128), GFX942: (4, 64), GFX950: (4, 64), INTERPRET: (4, 4)}
ATTENTION_MERGE: Table = {
    SM90: LaunchConfig(num_warps=1, num_stages=1),
    GFX942: LaunchConfig(num_warps=4, num_stages=1),
    GFX950: LaunchConfig(num_warps=4, num_stages=1),
    INTERPRET: LaunchConfig(),
}
# Of more than 32 splits.
ATTENTION_MERGE_MANY: Table = ATTENTION_MERGE | {SM90: LaunchConfig(num_warps=4, num_stages=1)}

# Dense attention of prefill rows. BLOCK_M: tokens times query heads of one KV head; BLOCK_N: as above. 128 registers:
# two programs fit on a multiprocessor, and one computes on the matrix units while the other takes its softmax.
DENSE_PREFILL: Table = {
    SM90: LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3, cuda={"maxnreg": 128}),
    GFX942: LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}),
}
DENSE_PREFILL_FP8: Table = {
    SM90: LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    GFX942: LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}),
}
DENSE_PREFILL_FLOAT32: Table = {
    SM90: LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=1),
    GFX942: LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}),
}
# (programs per unit, most splits of a tile), and the keys that a split has at least: a tile's keys are split where the
# tiles alone do not fill the device.
DENSE_PREFILL_PROGRAMS = {SM90: (2, 16), GFX942: (2, 16), GFX950: (2, 16), INTERPRET: (4, 4)}
DENSE_PREFILL_SPLIT_KEYS = 1024

# Block-sparse attention of prefill rows. SUB: keys per step of a program; it divides 128.
# Rows of a union tile: that many (token, query head) pairs of neighbouring tokens share what they load.
SPARSE_GROUP_ROWS = {SM90: 64, GFX942: 64, GFX950: 64, INTERPRET: 64}
BLOCK_UNIONS: Table = {
    SM90: LaunchConfig(num_warps=1, num_stages=1),
    GFX942: LaunchConfig(num_warps=4, num_stages=1),
    GFX950: LaunchConfig(num_warps=4, num_stages=1),
    INTERPRET: LaunchConfig(),
}
# Where a group selects more than 64 blocks.
BLOCK_UNIONS_WIDE: Table = dict.fromkeys((SM90, GFX942, GFX950, INTERPRET), LaunchConfig(num_warps=16, num_stages=1))
SPARSE_UNION: Table = {
    SM90: LaunchConfig({"SUB": 64}, num_warps=4, num_stages=3),
    GFX942: LaunchConfig({"SUB": 32}, num_warps=4, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"SUB": 64}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"SUB": 128}),
}
SPARSE_UNION_FP8: Table = {
    SM90: LaunchConfig({"SUB": 32}, num_warps=4, num_stages=3),
    GFX942: LaunchConfig({"SUB": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"SUB": 32}, num_warps=4, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"SUB": 128}),
}
SPARSE_UNION_FP32: Table = {
    SM90: LaunchConfig({"SUB": 16}, num_warps=8, num_stages=1),
    GFX942: LaunchConfig({"SUB": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"SUB": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"SUB": 64}),
}
# --- Linear layers (triton_linear.py) ---

# Above it, torch's GEMM.
LINEAR_MAX_TOKENS: dict[str, int] = {SM90: 16, GFX942: 16, GFX950: 16, INTERPRET: 16}
# One token: multiply and reduce; BLOCK_K decides the warps.
LINEAR_ONE: Table = {
    SM90: LaunchConfig({"BLOCK_N": 2, "BLOCK_K": 2048}, num_stages=1),
    GFX942: LaunchConfig({"BLOCK_N": 4, "BLOCK_K": 2048}, num_stages=1),
    GFX950: LaunchConfig({"BLOCK_N": 4, "BLOCK_K": 2048}, num_stages=1),
    INTERPRET: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 64}),
}
_NK16 = {"matrix_instr_nonkdim": 16}
# Up to 16 tokens.
LINEAR_16: Table = {
    SM90: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 256}, num_warps=2, num_stages=5),
    GFX942: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 256}, num_warps=4, num_stages=2, hip=_NK16),
    GFX950: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 256}, num_warps=4, num_stages=2, hip=_NK16),
    INTERPRET: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 32}),
}
# The same for weights of many rows (the LM head).
LINEAR_16_WIDE: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    GFX942: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=2, hip=_NK16),
    GFX950: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=2, hip=_NK16),
    INTERPRET: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 32}),
}

# --- Mixture of experts (triton_moe.py) ---

# Above it, pairs are sorted by expert.
MOE_FEW_TOKENS: dict[str, int] = {SM90: 64, GFX942: 64, GFX950: 64, INTERPRET: 64}
MOE_ONE_GATE_UP: Table = {
    SM90: LaunchConfig({"BLOCK_N": 2, "BLOCK_K": 2048}, num_stages=1),
    GFX942: LaunchConfig({"BLOCK_N": 2, "BLOCK_K": 2048}, num_stages=1),
    GFX950: LaunchConfig({"BLOCK_N": 2, "BLOCK_K": 2048}, num_stages=1),
    INTERPRET: LaunchConfig({"BLOCK_N": 16, "BLOCK_K": 64}),
}
MOE_ONE_DOWN: Table = {
    SM90: LaunchConfig({"BLOCK_N": 4, "BLOCK_K": 2048}, num_stages=1),
    GFX942: LaunchConfig({"BLOCK_N": 4, "BLOCK_K": 2048}, num_stages=1),
    GFX950: LaunchConfig({"BLOCK_N": 4, "BLOCK_K": 2048}, num_stages=1),
    INTERPRET: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 64}),
}
# Up to 16 tokens, then up to MOE_FEW_TOKENS. NARROW: experts of no more tokens use a tile of that many.
MOE_16_GATE_UP: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=4),
    GFX942: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    GFX950: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    INTERPRET: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 32, "NARROW": 16}),
}
MOE_16_DOWN: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=4),
    GFX942: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    GFX950: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    INTERPRET: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 32, "NARROW": 16}),
}
MOE_64_GATE_UP: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=3),
    GFX942: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    GFX950: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    INTERPRET: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 32, "NARROW": 16}),
}
MOE_64_DOWN: Table = {
    SM90: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=3),
    GFX942: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    GFX950: LaunchConfig({"BLOCK_N": 64, "BLOCK_K": 128, "NARROW": 16}, num_warps=4, num_stages=2, hip=_NK16),
    INTERPRET: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 32, "NARROW": 16}),
}
MOE_FEW_FP32: Table = {
    arch: LaunchConfig({"BLOCK_N": 32, "BLOCK_K": 32, "NARROW": 16}, num_warps=4, num_stages=1)
    for arch in (SM90, GFX942, GFX950, INTERPRET)
}
MOE_SORT: Table = {
    SM90: LaunchConfig({"BLOCK": 4096, "BLOCK_COUNT": 8192}, num_warps=8),
    GFX942: LaunchConfig({"BLOCK": 4096, "BLOCK_COUNT": 8192}, num_warps=8),
    GFX950: LaunchConfig({"BLOCK": 4096, "BLOCK_COUNT": 8192}, num_warps=8),
    INTERPRET: LaunchConfig({"BLOCK": 128, "BLOCK_COUNT": 256}),
}


# Sorted pairs. SMALL_M: an expert's last pairs use a tile of that many. SPAN: tiles of columns per program. TMA: the
# weight comes through tensor descriptors.
def _many(m: int, small: int, n: int, warps: int, stages: int, span: int = 1, tma: int = 0) -> LaunchConfig:
    tiles = {"BLOCK_M": m, "SMALL_M": small, "BLOCK_N": n, "BLOCK_K": 64, "GROUP_M": 8}
    return LaunchConfig({**tiles, "SPAN": span, "TMA": tma}, warps, stages)


_MANY_SMALL = {"BLOCK_K": 32, "GROUP_M": 2, "SPAN": 1, "TMA": 0}
# Few per expert: bound by the weights.
MOE_MANY_SHORT: Table = {
    SM90: _many(64, 64, 128, 4, 4),
    GFX942: replace(_many(64, 64, 128, 4, 2), hip=_NK16),
    GFX950: replace(_many(64, 64, 128, 4, 2), hip=_NK16),
    INTERPRET: LaunchConfig({"BLOCK_M": 16, "SMALL_M": 16, "BLOCK_N": 64, **_MANY_SMALL}),
}
# Many: bound by the matrix units.
MOE_MANY_GATE_UP: Table = {
    SM90: _many(128, 64, 256, 8, 3, tma=1),
    GFX942: _many(128, 64, 128, 8, 2),
    GFX950: _many(128, 64, 128, 8, 2),
    INTERPRET: LaunchConfig({"BLOCK_M": 32, "SMALL_M": 16, "BLOCK_N": 64, **_MANY_SMALL}),
}
MOE_MANY_DOWN: Table = {
    SM90: _many(128, 64, 256, 8, 4, span=4, tma=1),
    GFX942: _many(128, 64, 128, 8, 2),
    GFX950: _many(128, 64, 128, 8, 2),
    INTERPRET: LaunchConfig({"BLOCK_M": 32, "SMALL_M": 16, "BLOCK_N": 64, **_MANY_SMALL, "SPAN": 2}),
}
MOE_MANY_FP32: Table = {
    arch: LaunchConfig({"BLOCK_M": 32, "SMALL_M": 16, "BLOCK_N": 32, **_MANY_SMALL}, 4, 1)
    for arch in (SM90, GFX942, GFX950, INTERPRET)
}
MOE_SUM: Table = {arch: LaunchConfig({"BLOCK": 2048}) for arch in (SM90, GFX942, GFX950, INTERPRET)}

# Row-wise operations. ROWS: of one program; the *_MANY entries are for prefill.
RMS_NORM: Table = {
    SM90: LaunchConfig({"ROWS": 1}, num_warps=8),
    GFX942: LaunchConfig({"ROWS": 1}, num_warps=16),
    GFX950: LaunchConfig({"ROWS": 1}, num_warps=16),
    INTERPRET: LaunchConfig({"ROWS": 1}),
}
RMS_NORM_MANY: Table = {
    SM90: LaunchConfig({"ROWS": 4}, num_warps=8),
    GFX942: LaunchConfig({"ROWS": 4}, num_warps=8),
    GFX950: LaunchConfig({"ROWS": 4}, num_warps=8),
    INTERPRET: LaunchConfig({"ROWS": 4}),
}
SWIGLU: Table = {
    SM90: LaunchConfig({"BLOCK": 1024}, num_warps=4),
    GFX942: LaunchConfig({"BLOCK": 2048}, num_warps=4),
    GFX950: LaunchConfig({"BLOCK": 2048}, num_warps=4),
    INTERPRET: LaunchConfig({"BLOCK": 64}),
}
# ROWS: (token, head) vectors of one program.
QK_NORM_ROPE: Table = {
    SM90: LaunchConfig({"ROWS": 16}, num_warps=4),
    GFX942: LaunchConfig({"ROWS": 16}, num_warps=2),
    GFX950: LaunchConfig({"ROWS": 16}, num_warps=2),
    INTERPRET: LaunchConfig({"ROWS": 16}),
}
QK_NORM_ROPE_MANY: Table = {
    SM90: LaunchConfig({"ROWS": 32}, num_warps=4),
    GFX942: LaunchConfig({"ROWS": 32}, num_warps=4),
    GFX950: LaunchConfig({"ROWS": 32}, num_warps=4),
    INTERPRET: LaunchConfig({"ROWS": 64}),
}

# triton_index
# Decode programs per unit: of a row that has its own, and of rows that share them.
INDEX_DECODE_PROGRAMS = {SM90: (8, 12), GFX942: (5, 5), GFX950: (5, 5), INTERPRET: (2, 2)}
INDEX_SCORE_DECODE: Table = dict.fromkeys((SM90, GFX942, GFX950, INTERPRET), LaunchConfig(num_warps=4, num_stages=1))
# fp8 keys, one index head.
INDEX_SCORE_DECODE_FP8: Table = INDEX_SCORE_DECODE | {SM90: LaunchConfig(num_warps=2, num_stages=1)}
INDEX_SCORE_DECODE_FP32: Table = dict.fromkeys(
    (SM90, GFX942, GFX950, INTERPRET), LaunchConfig(num_warps=8, num_stages=1)
)
INDEX_SELECT_DECODE: Table = {
    SM90: LaunchConfig(num_warps=1, num_stages=1),
    GFX942: LaunchConfig(num_warps=1, num_stages=1),
    GFX950: LaunchConfig(num_warps=1, num_stages=1),
    INTERPRET: LaunchConfig(num_warps=1),
}
INDEX_SCORE_PREFILL: Table = {
    SM90: LaunchConfig({"BLOCK_Q": 128}, num_warps=8, num_stages=3),
    GFX942: LaunchConfig({"BLOCK_Q": 128}, num_warps=8, num_stages=2),
    GFX950: LaunchConfig({"BLOCK_Q": 128}, num_warps=8, num_stages=2),
    INTERPRET: LaunchConfig({"BLOCK_Q": 32}),
}
INDEX_SCORE_PREFILL_FP32: Table = {
    SM90: LaunchConfig({"BLOCK_Q": 16}, num_warps=8, num_stages=1),
    GFX942: LaunchConfig({"BLOCK_Q": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    GFX950: LaunchConfig({"BLOCK_Q": 32}, num_warps=8, num_stages=1, hip=_MFMA16),
    INTERPRET: LaunchConfig({"BLOCK_Q": 32}),
}
# SCORES: how many a thread holds.
INDEX_SELECT_PREFILL: Table = {
    SM90: LaunchConfig({"SCORES": 32}, num_stages=1),
    GFX942: LaunchConfig({"SCORES": 8}, num_stages=1),
    GFX950: LaunchConfig({"SCORES": 8}, num_stages=1),
    INTERPRET: LaunchConfig({"SCORES": 64}),
}


# The router. SPLIT_K: columns of hidden that one program sums; the two entries for decode share it and BLOCK_K, and so
# the order of the sums.
def _route(tokens: int, experts: int, k: int, split: int, experts_on_m: int, warps: int, stages: int) -> LaunchConfig:
    tiles = {"BLOCK_T": tokens, "BLOCK_E": experts, "BLOCK_K": k, "SPLIT_K": split, "EXPERTS_ON_M": experts_on_m}
    return LaunchConfig(tiles, warps, stages, hip=_MFMA16)


ROUTE_LOGITS: Table = {
    SM90: _route(16, 32, 64, 256, 0, 4, 4),
    GFX942: _route(16, 32, 64, 128, 0, 2, 2),
    GFX950: _route(16, 32, 64, 128, 0, 2, 2),
    INTERPRET: _route(16, 16, 32, 64, 0, 4, 2),
}
ROUTE_LOGITS_SOME: Table = {
    SM90: _route(32, 16, 64, 256, 0, 2, 4),
    GFX942: _route(32, 32, 64, 128, 0, 2, 2),
    GFX950: _route(32, 32, 64, 128, 0, 2, 2),
    INTERPRET: _route(32, 16, 32, 64, 0, 4, 2),
}
ROUTE_LOGITS_MANY: Table = {
    SM90: _route(128, 128, 32, 2048, 1, 8, 4),
    GFX942: _route(128, 128, 32, 2048, 0, 8, 2),
    GFX950: _route(128, 128, 32, 2048, 0, 8, 2),
    INTERPRET: _route(128, 16, 32, 64, 1, 4, 2),
}
ROUTE_LOGITS_FLOAT32: Table = {
    SM90: _route(16, 16, 32, 512, 0, 4, 1),
    GFX942: _route(16, 16, 32, 512, 0, 4, 1),
    GFX950: _route(16, 16, 32, 512, 0, 4, 1),
    INTERPRET: _route(32, 16, 64, 64, 0, 4, 1),
}
# ROWS: tokens of one program.
ROUTE_SELECT: Table = {
    SM90: LaunchConfig({"ROWS": 1}, num_warps=1),
    GFX942: LaunchConfig({"ROWS": 1}, num_warps=1),
    GFX950: LaunchConfig({"ROWS": 1}, num_warps=1),
    INTERPRET: LaunchConfig({"ROWS": 4}),
}
ROUTE_SELECT_MANY: Table = {
    SM90: LaunchConfig({"ROWS": 8}, num_warps=4),
    GFX942: LaunchConfig({"ROWS": 8}, num_warps=4),
    GFX950: LaunchConfig({"ROWS": 8}, num_warps=4),
    INTERPRET: LaunchConfig({"ROWS": 16}),
}

# triton_reduce: a row of words per program. Groups of AMD's GPUs sum otherwise, see engine/collectives.py.
ALL_REDUCE: Table = {SM90: LaunchConfig(num_warps=8), INTERPRET: LaunchConfig()}

# Sampling. CHUNK: tokens of the vocabulary per program; it decides near-ties, so it does not depend on the batch.
SAMPLE_CHUNK: Table = {
    SM90: LaunchConfig({"CHUNK": 1024}, num_warps=4),
    GFX942: LaunchConfig({"CHUNK": 1024}, num_warps=4),
    GFX950: LaunchConfig({"CHUNK": 1024}, num_warps=4),
    INTERPRET: LaunchConfig({"CHUNK": 64}),
}
SAMPLE_MERGE: Table = {
    SM90: LaunchConfig(num_warps=1, cuda={"launch_pdl": True}),
    GFX942: LaunchConfig(num_warps=1),
    GFX950: LaunchConfig(num_warps=1),
    INTERPRET: LaunchConfig(),
}
