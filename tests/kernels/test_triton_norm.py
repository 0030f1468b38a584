"""Norms, the fused norm + rotation + insert, and SwiGLU of the triton backend against the torch backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import torch_linear, torch_norm, triton_norm
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, QKVLayout, SwigluParams
from engine.kernels.torch_pages import take_rows
from engine.model.rope import rope_table
from tests.kernels.devices import DEVICE, ON_GPU, TARGET

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# One step of bf16: the interpreter truncates where a GPU rounds.
CLOSE = {torch.float32: {"atol": 2e-6, "rtol": 2e-5}, torch.bfloat16: {"atol": 1e-3, "rtol": 1.6e-2}}
FP8 = torch.float8_e4m3fnuz if TARGET.arch == "gfx942" else torch.float8_e4m3fn
PAGE = 128


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 96), (3, 64), (33, 96), (2, 6144)])
@pytest.mark.parametrize("many_rows", [1, 1024])
def test_norms(rows: int, size: int, dtype: torch.dtype, many_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norm, "_MANY_ROWS", many_rows)
    x, residual, gain = randn(rows, size, dtype=dtype), randn(rows, size, seed=1, dtype=dtype), randn(size, seed=2)
    expected = torch_norm.rms_norm(x, gain, EPS)
    torch.testing.assert_close(triton_norm.rms_norm(TARGET, x, gain, EPS), expected, **CLOSE[dtype])
    normed, total = triton_norm.add_rms_norm(TARGET, x, residual, gain, EPS)
    assert normed.dtype == total.dtype == dtype
    torch.testing.assert_close(total, x + residual, **CLOSE[dtype])
    # Of the residual stream as it was stored, whichever way that was rounded.
    torch.testing.assert_close(normed, torch_norm.rms_norm(total, gain, EPS), **CLOSE[dtype])
    if dtype == torch.float32 or ON_GPU:
        assert torch.equal(total, x + residual)


def test_norm_takes_views() -> None:
    wide, gain = randn(4, 3, 128), randn(64, seed=1)
    expected = torch_norm.rms_norm(wide[..., 32:96], gain, EPS)
    torch.testing.assert_close(triton_norm.rms_norm(TARGET, wide[..., 32:96], gain, EPS), expected)
    torch.testing.assert_close(
        triton_norm.rms_norm(TARGET, wide[:, 1, :64], gain, EPS), torch_norm.rms_norm(wide[:, 1, :64], gain, EPS)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (3, 64), (33, 100)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (randn(rows, 2 * width) * 6).to(dtype)  # some beyond the limit on either side
    params = SwigluParams(alpha=1.702, limit=7.0, beta=1.0)
    out = triton_norm.swiglu(TARGET, gate_up, params)
    torch.testing.assert_close(out, torch_linear.swiglu(gate_up.clone(), params), **CLOSE[dtype])


def test_swiglu_shows_nan() -> None:
    gate_up = torch.zeros(1, 8, device=DEVICE)
    gate_up[0, 1] = gate_up[0, 6] = torch.nan
    out = triton_norm.swiglu(TARGET, gate_up, SwigluParams(1.702, 7.0, 1.0))
    assert out.isnan().tolist() == [[False, True, True, False]]


def insert_batch(num_tokens: int) -> tuple[StepBatch, int]:
    """A prefill row whose slots are scattered over pages, every fifth of them -1; (batch, number of pages)."""
    positions = torch.arange(num_tokens) * 7 + 120
    num_pages = int(positions[-1]) // PAGE + 2
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3))
    slots = order[positions // PAGE] * PAGE + positions % PAGE
    slots[4::5] = -1
    table = order.int()[None]
    batch = StepBatch(
        positions=positions.to(DEVICE),
        slot_mapping=slots.to(DEVICE),
        row_ids=torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE),
        block_table=table.to(DEVICE),
        seq_lens=positions[-1:].int().to(DEVICE) + 1,
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=DEVICE),
        query_starts=[0, num_tokens],
        seq_lens_host=[int(positions[-1]) + 1],
        segments=(Segment("prefill", 0, 1, 0, num_tokens),),
    )
    return batch, num_pages


def empty_pages(num_pages: int, layout: QKVLayout, dtype: torch.dtype) -> KVPages:
    """Pages full of ones, so that a stray write shows."""
    heads, with_index = layout.num_kv_heads, layout.num_index_heads > 0
    fp8 = dtype == FP8

    def pool(*shape: int) -> Tensor:
        return torch.ones(num_pages, *shape, device=DEVICE).to(dtype)

    def scales(*shape: int) -> Tensor | None:
        return torch.ones(num_pages, *shape, device=DEVICE) if fp8 else None

    return KVPages(
        k=pool(heads, PAGE, layout.head_dim),
        v=pool(heads, PAGE, layout.head_dim),
        index_k=pool(PAGE, layout.index_dim) if with_index else None,
        k_scale=scales(heads, PAGE),
        v_scale=scales(heads, PAGE),
        index_k_scale=scales(PAGE) if with_index else None,
    )


def run_insert(
    num_tokens: int, layout: QKVLayout, dtype: torch.dtype, page_dtype: torch.dtype, zeros: bool = False
) -> None:
    """The operation of both backends on equal inputs; q, index_q and every cell of the pages must agree."""
    batch, num_pages = insert_batch(num_tokens)
    qkv = randn(num_tokens, sum(layout.sizes), seed=4, dtype=dtype) * (0.0 if zeros else 1.0)
    gains = [randn(layout.num_heads + layout.num_kv_heads, layout.head_dim, seed=5)]
    if layout.num_index_heads:
        gains.append(randn(layout.num_index_heads + 1, layout.index_dim, seed=6))
    table = rope_table(int(batch.positions[-1]) + 1, layout.rotary_dim, 10000.0).to(DEVICE)
    ours, expected = empty_pages(num_pages, layout, page_dtype), empty_pages(num_pages, layout, page_dtype)
    q, index_q = triton_norm.qk_norm_rope_insert(TARGET, qkv, tuple(gains), table, batch, layout, ours)
    kept = batch.slot_mapping >= 0
    # The torch backend has no -1: leave those tokens out, and take its q from a run with all of them.
    written = StepBatch(
        **{name: getattr(batch, name) for name in StepBatch.__slots__}
        | {"positions": batch.positions[kept], "slot_mapping": batch.slot_mapping[kept]}
    )
    torch_norm.qk_norm_rope_insert(qkv[kept], tuple(gains), table, written, layout, expected)
    scratch = empty_pages(num_pages, layout, page_dtype)
    expected_q, expected_index_q = torch_norm.qk_norm_rope_insert(qkv, tuple(gains), table, batch, layout, scratch)
    torch.testing.assert_close(q, expected_q, **CLOSE[dtype])
    if layout.num_index_heads:
        torch.testing.assert_close(index_q, expected_index_q, **CLOSE[dtype])
    else:
        assert index_q is None
    for name in ("k", "v", "index_k"):
        pool, wanted = getattr(ours, name), getattr(expected, name)
        if pool is None:
            continue
        if page_dtype != FP8:
            torch.testing.assert_close(pool, wanted, **CLOSE[dtype])
            continue
        scale, wanted_scale = getattr(ours, name + "_scale"), getattr(expected, name + "_scale")
        torch.testing.assert_close(scale, wanted_scale, **CLOSE[dtype])
        rows = torch.arange(pool.numel() // (PAGE * pool.shape[-1]), device=DEVICE)
        values, wanted_values = take_rows(pool, scale, rows), take_rows(wanted, wanted_scale, rows)
        # A value between two fp8 numbers may go either way, but rarely.
        step = (wanted_values.abs() / 8).clamp(min=wanted_scale.max().item() * 2.0**-9) * 1.05
        assert ((values - wanted_values).abs() <= step).all()
        if dtype == torch.float32:
            differ = (values - wanted_values).abs() > 1e-4 * wanted_values.abs()
            assert differ.float().mean() < 1e-3


LAYOUTS = {
    "index": QKVLayout(4, 2, 32, 2, 32, rotary_dim=16, eps=EPS),
    "small index dim": QKVLayout(6, 3, 64, 1, 32, rotary_dim=32, eps=EPS),
    "no index": QKVLayout(4, 1, 32, 0, 32, rotary_dim=32, eps=EPS),
    "model": QKVLayout(16, 1, 128, 1, 128, rotary_dim=64, eps=EPS),
}


@pytest.mark.parametrize("num_tokens", [1, 3, 33])
@pytest.mark.parametrize("name", LAYOUTS)
def test_qk_norm_rope_insert(name: str, num_tokens: int) -> None:
    run_insert(num_tokens, LAYOUTS[name], torch.float32, torch.float32)


@pytest.mark.parametrize("page_dtype", [torch.bfloat16, FP8])
def test_qk_norm_rope_insert_bf16(page_dtype: torch.dtype) -> None:
    run_insert(33, LAYOUTS["index"], torch.bfloat16, page_dtype)


def test_qk_norm_rope_insert_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norm, "_MANY_ROWS", 1)
    run_insert(33, LAYOUTS["index"], torch.float32, torch.float32)


@pytest.mark.parametrize("name", ["small index dim", "no index"])
def test_qk_norm_rope_insert_fp8(name: str) -> None:
    run_insert(33, LAYOUTS[name], torch.float32, FP8)


def test_fp8_scale_of_zeros_is_one() -> None:
    run_insert(2, LAYOUTS["index"], torch.float32, FP8, zeros=True)


def test_fnuz_is_rounded_like_torch() -> None:
    """What only gfx942 runs, in the interpreter."""
    if ON_GPU:
        pytest.skip("the GPU has its own fp8 type")
    layout = LAYOUTS["no index"]
    batch, num_pages = insert_batch(9)
    pools = [torch.ones(num_pages, 1, PAGE, 32).to(torch.float8_e4m3fnuz) for _ in range(2)]
    pages = KVPages(*pools, None, torch.ones(num_pages, 1, PAGE), torch.ones(num_pages, 1, PAGE))
    qkv, table = randn(9, sum(layout.sizes)), rope_table(256, 32, 10000.0)
    triton_norm.qk_norm_rope_insert(TARGET, qkv, (randn(5, 32, seed=1),), table, batch, layout, pages)
    v = qkv[0, -32:]
    page, offset = int(batch.slot_mapping[0]) // PAGE, int(batch.slot_mapping[0]) % PAGE
    assert pages.v_scale is not None
    scale = v.abs().max() / 240
    torch.testing.assert_close(pages.v_scale[page, 0, offset], scale)
    assert torch.equal(pages.v[page, 0, offset].float(), (v / scale).to(torch.float8_e4m3fnuz).float())


@pytest.mark.skipif(not ON_GPU, reason="slow in the interpreter")
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, FP8])
def test_qk_norm_rope_insert_long(page_dtype: torch.dtype) -> None:
    run_insert(3001, LAYOUTS["model"], torch.bfloat16, page_dtype)
