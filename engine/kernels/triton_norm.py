# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Gemma RMS norms, per-head norm + partial RoPE + page insert, and SwiGLU, in Triton.

Every value is converted to fp32 right after its load and rounded once, at its store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import configs
from engine.kernels.batch import StepBatch
from engine.kernels.launch import LaunchConfig, Target
from engine.kernels.params import KVPages, QKVLayout, SwigluParams
from engine.kernels.triton_common import follow, swiglu_oai

# From this many rows on, programs take several rows each; below, a launch is over before bandwidth matters.
_MANY_ROWS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr, residual_ptr, gain_ptr, normed_ptr, total_ptr, num_rows, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(num_rows / ROWS)). normed and total are contiguous; residual and total are None without ADD."""
    columns = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + columns, mask=columns < SIZE, other=0.0)
    follow(OVERLAP)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for index in range(ROWS):
        row = first + index
        mask = columns < tl.where(row < num_rows, SIZE, 0)
        values = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            residual = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0)
            # The norm is of the residual stream as the next layer will read it: rounded.
            total = (values + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * SIZE + columns, total, mask=mask)
            values = total.to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
        tl.store(normed_ptr + row * SIZE + columns, values * scale * gain, mask=mask)


def rms_norm(target: Target, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """See torch_norm.rms_norm."""
    return _norm(target, x, None, gain, eps)[0]


def add_rms_norm(target: Target, x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See torch_norm.add_rms_norm."""
    normed, total = _norm(target, x, residual, gain, eps)
    assert total is not None
    return normed, total


def _norm(target: Target, x: Tensor, residual: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    size = gain.shape[0]
    rows = x.reshape(-1, size)
    residual_rows = None if residual is None else residual.reshape(-1, size)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    config = _by_rows(target, rows.shape[0], configs.RMS_NORM, configs.RMS_NORM_MANY)
    target.launch(
        _norm_kernel,
        (triton.cdiv(rows.shape[0], config["ROWS"]),),
        rows,
        residual_rows,
        gain,
        normed,
        total,
        rows.shape[0],
        rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        eps,
        config=config,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        ADD=residual is not None,
        OVERLAP=target.overlaps,
    )
    return normed, total


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, out_ptr, gate_up_stride, alpha, limit, beta, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows, ceil(WIDTH / BLOCK))."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_up_ptr + row * gate_up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, swiglu_oai(gate, up, alpha, limit, beta), mask=mask)


def swiglu(target: Target, gate_up: Tensor, params: SwigluParams) -> Tensor:
    """See torch_linear.swiglu; gate_up stays as it is."""
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width)
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    config = configs.SWIGLU[target.arch]
    target.launch(
        _swiglu_kernel,
        (rows.shape[0], triton.cdiv(width, config["BLOCK"])),
        rows,
        out,
        rows.stride(0),
        params.alpha,
        params.limit,
        params.beta,
        config=config,
        WIDTH=width,
        OVERLAP=target.overlaps,
    )
    return out


@triton.jit
def _pairs(DIM: tl.constexpr, ROTARY: tl.constexpr):
    """Dims of a vector as two tiles, int32 [1, DIM // 2]: `low` takes the even chunks of ROTARY // 2 dims and `high`
    the odd ones, so that the pairs of the rotation, all in the first chunks, meet without a shuffle."""
    HALF: tl.constexpr = ROTARY // 2
    column = tl.arange(0, DIM // 2)[None, :]
    low = column + column // HALF * HALF
    return low, low + HALF


@triton.jit
def _load_vectors(vector_ptr, mask, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """Vectors at vector_ptr [R], as float32 [R, DIM // 2] low and high."""
    low, high = _pairs(DIM, ROTARY)
    return (
        tl.load(vector_ptr[:, None] + low, mask=mask[:, None], other=0.0).to(tl.float32),
        tl.load(vector_ptr[:, None] + high, mask=mask[:, None], other=0.0).to(tl.float32),
    )


@triton.jit
def _rotated(
    vector_ptr, gain_ptr, cos_sin_ptr, mask, eps,
    DIM: tl.constexpr, ROTARY: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of vectors, each with its gain and its row of the table (pointers [R]); low and high of
    DTYPE."""
    HALF: tl.constexpr = ROTARY // 2
    low, high = _load_vectors(vector_ptr, mask, DIM, ROTARY)
    gain_low, gain_high = _load_vectors(gain_ptr, mask, DIM, ROTARY)
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)[:, None]
    low = low * scale * gain_low
    high = high * scale * gain_high
    # Dims from ROTARY on turn by the angle 0.
    column = tl.arange(0, DIM // 2)[None, :]
    turned = mask[:, None] & (column < HALF)
    cos = tl.load(cos_sin_ptr[:, None] + column, mask=turned, other=1.0)
    sin = tl.load(cos_sin_ptr[:, None] + HALF + column, mask=turned, other=0.0)
    return (low * cos - high * sin).to(DTYPE), (high * cos + low * sin).to(DTYPE)


@triton.jit
def _round_e4m3(x, LIMIT: tl.constexpr):
    """The nearest e4m3 value, as float32, of |x| <= LIMIT: 3 mantissa bits down to the smallest normal, then a fixed
    step. Only for Triton's interpreter, whose own conversion rounds wrongly; it is exact for values that fit."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # 1.5 * 2^(23 - 9) for e4m3fn; e4m3fnuz reaches one power of two lower.
    MAGIC: tl.constexpr = 24576.0 if LIMIT > 240.0 else 12288.0
    SMALLEST: tl.constexpr = 0.015625 if LIMIT > 240.0 else 0.0078125
    return tl.where(tl.abs(x) < SMALLEST, (x + MAGIC) - MAGIC, normal)


@triton.jit
def _insert(
    low, high, head, slot, mask, pool_ptr, scale_ptr, page_stride, head_stride, vector_stride,
    DIM: tl.constexpr, ROTARY: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, LIMIT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Store vectors (low and high of the compute dtype) at their slots; LIMIT: the largest fp8 value, 0 without fp8.

    The scales are contiguous: [pages, HEADS, PAGE].
    """
    mask = mask & (slot >= 0)
    page, offset = slot // PAGE, slot % PAGE
    if LIMIT > 0:
        low, high = low.to(tl.float32), high.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        scale = tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32))
        scale = tl.where(scale > 0, scale, 1.0)
        tl.store(scale_ptr + (page * HEADS + head) * PAGE + offset, scale, mask=mask)
        wide = tl.broadcast_to(scale[:, None], low.shape)
        low = tl.minimum(tl.maximum(tl.div_rn(low, wide), -LIMIT), LIMIT)
        high = tl.minimum(tl.maximum(tl.div_rn(high, wide), -LIMIT), LIMIT)
        if UPCAST:
            low, high = _round_e4m3(low, LIMIT), _round_e4m3(high, LIMIT)
    low_dims, high_dims = _pairs(DIM, ROTARY)
    vector_ptr = (pool_ptr + page * page_stride + head * head_stride + offset * vector_stride)[:, None]
    tl.store(vector_ptr + low_dims, low.to(pool_ptr.dtype.element_ty), mask=mask[:, None])
    tl.store(vector_ptr + high_dims, high.to(pool_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _dense_part(
    first, num_tokens, part_ptr, row_stride, gain_ptr, table_ptr, positions_ptr, out_ptr, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS (token, head) vectors of q or index_q, from number `first` on, into a dense output."""
    vector = first + tl.arange(0, ROWS)
    token, head, mask = vector // HEADS, vector % HEADS, vector < num_tokens * HEADS
    position = tl.load(positions_ptr + token, mask=mask, other=0)
    low, high = _rotated(
        part_ptr + token * row_stride + head * DIM, gain_ptr + head * DIM, table_ptr + position * ROTARY, mask, eps,
        DIM, ROTARY, part_ptr.dtype.element_ty,
    )  # fmt: skip
    low_dims, high_dims = _pairs(DIM, ROTARY)
    tl.store(out_ptr + vector[:, None] * DIM + low_dims, low, mask=mask[:, None])
    tl.store(out_ptr + vector[:, None] * DIM + high_dims, high, mask=mask[:, None])


@triton.jit
def _page_part(
    first, num_tokens, part_ptr, row_stride, gain_ptr, table_ptr, positions_ptr, eps,
    slots_ptr, pool_ptr, scale_ptr, page_stride, head_stride, vector_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, PAGE: tl.constexpr,
    LIMIT: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS (token, head) vectors of k, v or index_k into their pages; without NORM as they are."""
    vector = first + tl.arange(0, ROWS)
    token, head, mask = vector // HEADS, vector % HEADS, vector < num_tokens * HEADS
    slot = tl.load(slots_ptr + token, mask=mask, other=-1)
    vector_ptr = part_ptr + token * row_stride + head * DIM
    if NORM:
        position = tl.load(positions_ptr + token, mask=mask, other=0)
        low, high = _rotated(
            vector_ptr, gain_ptr + head * DIM, table_ptr + position * ROTARY, mask, eps,
            DIM, ROTARY, part_ptr.dtype.element_ty,
        )  # fmt: skip
    else:
        low, high = _load_vectors(vector_ptr, mask, DIM, ROTARY)
    _insert(
        low, high, head, slot, mask, pool_ptr, scale_ptr, page_stride, head_stride, vector_stride,
        DIM, ROTARY, HEADS, PAGE, LIMIT, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _qk_norm_rope_insert_kernel(
    qkv_ptr, gain_ptr, index_gain_ptr, table_ptr, positions_ptr, slots_ptr, q_ptr, index_q_ptr,
    k_ptr, v_ptr, index_k_ptr, k_scale_ptr, v_scale_ptr, index_k_scale_ptr,
    num_tokens, row_stride, page_stride, head_stride, vector_stride, index_page_stride, index_vector_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, INDEX_HEADS: tl.constexpr,
    INDEX_DIM: tl.constexpr, ROTARY: tl.constexpr, PAGE: tl.constexpr, LIMIT: tl.constexpr,
    INDEX_LIMIT: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS vectors of one part of the packed row: the first programs those of q, the next ones k, v,
    index_k and index_q. See qk_norm_rope_insert for the tensors."""
    follow(OVERLAP)
    num_q = tl.cdiv(num_tokens * HEADS, ROWS)
    num_kv = tl.cdiv(num_tokens * KV_HEADS, ROWS)
    num_index = tl.cdiv(num_tokens, ROWS) if INDEX_HEADS > 0 else 0
    pid = tl.program_id(0)
    # Counted from the programs of each part.
    k_pid = pid - num_q
    v_pid = k_pid - num_kv
    index_pid = v_pid - num_kv
    if pid < num_q:
        _dense_part(
            pid * ROWS, num_tokens, qkv_ptr, row_stride, gain_ptr, table_ptr, positions_ptr, q_ptr, eps,
            HEADS, DIM, ROTARY, ROWS,
        )  # fmt: skip
    elif k_pid < num_kv:
        _page_part(
            k_pid * ROWS, num_tokens, qkv_ptr + HEADS * DIM, row_stride, gain_ptr + HEADS * DIM, table_ptr,
            positions_ptr, eps, slots_ptr, k_ptr, k_scale_ptr, page_stride, head_stride, vector_stride,
            KV_HEADS, DIM, ROTARY, True, PAGE, LIMIT, UPCAST, ROWS,
        )  # fmt: skip
    elif v_pid < num_kv:
        _page_part(
            v_pid * ROWS, num_tokens, qkv_ptr + (HEADS + KV_HEADS) * DIM, row_stride, gain_ptr, table_ptr,
            positions_ptr, eps, slots_ptr, v_ptr, v_scale_ptr, page_stride, head_stride, vector_stride,
            KV_HEADS, DIM, ROTARY, False, PAGE, LIMIT, UPCAST, ROWS,
        )  # fmt: skip
    elif INDEX_HEADS > 0:
        index_ptr = qkv_ptr + (HEADS + 2 * KV_HEADS) * DIM
        if index_pid < num_index:
            _page_part(
                index_pid * ROWS, num_tokens, index_ptr + INDEX_HEADS * INDEX_DIM, row_stride,
                index_gain_ptr + INDEX_HEADS * INDEX_DIM, table_ptr, positions_ptr, eps, slots_ptr, index_k_ptr,
                index_k_scale_ptr, index_page_stride, 0, index_vector_stride,
                1, INDEX_DIM, ROTARY, True, PAGE, INDEX_LIMIT, UPCAST, ROWS,
            )  # fmt: skip
        else:
            _dense_part(
                (index_pid - num_index) * ROWS, num_tokens, index_ptr, row_stride, index_gain_ptr, table_ptr,
                positions_ptr, index_q_ptr, eps, INDEX_HEADS, INDEX_DIM, ROTARY, ROWS,
            )  # fmt: skip


def qk_norm_rope_insert(
    target: Target,
    qkv: Tensor,
    gains: tuple[Tensor, ...],
    cos_sin_table: Tensor,
    batch: StepBatch,
    layout: QKVLayout,
    pages: KVPages,
) -> tuple[Tensor, Tensor | None]:
    """See torch_norm.qk_norm_rope_insert. Keys of tokens whose slot is -1 are written nowhere."""
    num_tokens = qkv.shape[0]
    index_heads = 0 if pages.index_k is None else layout.num_index_heads
    q = torch.empty(num_tokens, layout.num_heads, layout.head_dim, dtype=qkv.dtype, device=qkv.device)
    index_q = None
    if index_heads:
        index_q = torch.empty(num_tokens, index_heads, layout.index_dim, dtype=qkv.dtype, device=qkv.device)
    assert pages.k.stride() == pages.v.stride() and pages.k.stride(3) == 1 and qkv.stride(1) == 1
    config = _by_rows(target, num_tokens, configs.QK_NORM_ROPE, configs.QK_NORM_ROPE_MANY)
    heads = (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads, *((1, index_heads) if index_heads else ()))
    target.launch(
        _qk_norm_rope_insert_kernel,
        (sum(triton.cdiv(num_tokens * count, config["ROWS"]) for count in heads),),
        qkv,
        gains[0],
        gains[1] if index_heads else None,
        cos_sin_table,
        batch.positions,
        batch.slot_mapping,
        q,
        index_q,
        pages.k,
        pages.v,
        pages.index_k,
        pages.k_scale,
        pages.v_scale,
        pages.index_k_scale,
        num_tokens,
        qkv.stride(0),
        *pages.k.stride()[:3],
        *(pages.index_k.stride()[:2] if pages.index_k is not None else (0, 0)),
        layout.eps,
        config=config,
        HEADS=layout.num_heads,
        KV_HEADS=layout.num_kv_heads,
        DIM=layout.head_dim,
        INDEX_HEADS=index_heads,
        INDEX_DIM=layout.index_dim,
        ROTARY=layout.rotary_dim,
        PAGE=pages.k.shape[2],
        LIMIT=_fp8_limit(pages.k, pages.k_scale),
        INDEX_LIMIT=_fp8_limit(pages.index_k, pages.index_k_scale),
        UPCAST=target.interpreted,
        OVERLAP=target.overlaps,
    )
    return q, index_q


def _by_rows(target: Target, num_rows: int, few: configs.Table, many: configs.Table) -> LaunchConfig:
    return (many if num_rows >= _MANY_ROWS else few)[target.arch]


def _fp8_limit(pool: Tensor | None, scale: Tensor | None) -> float:
    """The largest value of an fp8 pool; 0 where the pool is not fp8."""
    return 0.0 if pool is None or scale is None else torch.finfo(pool.dtype).max
