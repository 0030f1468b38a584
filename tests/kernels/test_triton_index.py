"""The indexer's Triton kernels against the torch oracle: the same blocks, exactly.

Index queries and keys are small integers, so that sums are exact in any order, and many blocks tie.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.kernels import torch_index, triton_index
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, Selection, SelectParams
from tests.kernels import reference
from tests.kernels.devices import DEVICE, ON_GPU, TARGET, to_device

# Lengths around the page size, fewer blocks than topk, exactly topk, one more; decode rows first.
DECODE = [(0, 1), (5, 1), (126, 1), (127, 1), (128, 1), (383, 1), (384, 1), (511, 1), (512, 1), (700, 1), (1500, 1)]
PREFILL = [(600, 20), (127, 2), (0, 129), (0, 1000), (391, 140)]
PARAMS = [SelectParams(4, 0, 1), SelectParams(3, 1, 2), SelectParams(1, 0, 1), SelectParams(8, 0, 0)]
FP8 = torch.float8_e4m3fn if TARGET.arch != "gfx942" else torch.float8_e4m3fnuz
DTYPES = [torch.float32, torch.bfloat16, FP8]


def integer_step(rows: list[tuple[int, int]], *, index_heads: int, dim: int, seed: int) -> reference.Step:
    """A random step whose index queries and keys are small integers."""
    step = reference.random_step(rows, heads=index_heads, kv_heads=1, index_heads=index_heads, dim=dim, seed=seed)
    assert step.pages.index_k is not None
    pages = dataclasses.replace(step.pages, index_k=step.pages.index_k.mul(0.7).round())
    return dataclasses.replace(step, pages=pages, index_q=step.index_q.mul(0.7).round())


def cast(step: reference.Step, dtype: torch.dtype) -> reference.Step:
    """`step` with index queries and keys of `dtype`; fp8 keys get scales that are powers of two."""
    pages = step.pages
    assert pages.index_k is not None
    if dtype != FP8:
        return dataclasses.replace(
            step, pages=dataclasses.replace(pages, index_k=pages.index_k.to(dtype)), index_q=step.index_q.to(dtype)
        )
    scale = torch.randint(0, 3, pages.index_k.shape[:2], generator=torch.Generator().manual_seed(0)).exp2()
    pages = KVPages(pages.k, pages.v, pages.index_k.to(FP8), None, None, scale)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    return dataclasses.replace(step, pages=pages, index_q=step.index_q.to(dtype))


def oracle(step: reference.Step, params: SelectParams) -> Selection:
    out = empty_selection(step, params)
    for segment in step.batch.segments:
        torch_index.select_blocks(step.index_q, step.pages, step.batch, segment, params, out)
    return out


def empty_selection(step: reference.Step, params: SelectParams) -> Selection:
    heads, num_tokens = step.index_q.shape[1], step.batch.num_tokens
    return Selection(
        torch.full((heads, num_tokens, params.topk_blocks), -9, dtype=torch.int32),
        torch.full((num_tokens,), -9, dtype=torch.int32),
    )


def select(step: reference.Step, params: SelectParams) -> Selection:
    """By the kernels, back on CPU."""
    on_device = to_device(step)
    out = empty_selection(step, params)
    out = Selection(out.blocks.to(DEVICE), out.num_blocks.to(DEVICE))
    for segment in on_device.batch.segments:
        triton_index.select_blocks(TARGET, on_device.index_q, on_device.pages, on_device.batch, segment, params, out)
    return Selection(out.blocks.cpu(), out.num_blocks.cpu())


def check(step: reference.Step, params: SelectParams) -> None:
    got, expected = select(step, params), oracle(step, params)
    assert torch.equal(got.num_blocks, expected.num_blocks)
    assert torch.equal(got.blocks, expected.blocks)


VARIANTS = ["apart", "balanced"]


@pytest.fixture
def decode_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_index, "BALANCED_FROM", 1 if request.param == "balanced" else 10**6)


CASES = [(params, 2, torch.float32) for params in PARAMS]
CASES += [(PARAMS[0], 1, dtype) for dtype in DTYPES[1:]] + [(PARAMS[0], 3, torch.float32)]
if ON_GPU:
    CASES += [(PARAMS[1], 2, dtype) for dtype in DTYPES[1:]]


@pytest.mark.parametrize("params, heads, dtype", CASES, ids=str)
def test_decode(params: SelectParams, heads: int, dtype: torch.dtype) -> None:
    check(cast(integer_step(DECODE, index_heads=heads, dim=32, seed=1), dtype), params)


@pytest.mark.usefixtures("decode_variant")
@pytest.mark.parametrize("decode_variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("rows", [[(1000, 1)], [(100, 1)], DECODE[3::2]], ids=str)
def test_decode_variants(rows: list[tuple[int, int]]) -> None:
    """Whatever the number of launches, and of programs per row."""
    step = integer_step(rows, index_heads=2, dim=64, seed=2)
    check(step, PARAMS[0])
    if ON_GPU:
        check(cast(step, torch.bfloat16), PARAMS[0])
        check(cast(step, FP8), PARAMS[0])


@pytest.mark.parametrize("params, heads, dtype", CASES, ids=str)
def test_prefill(params: SelectParams, heads: int, dtype: torch.dtype) -> None:
    rows = DECODE[6:8] + (PREFILL if ON_GPU else [*PREFILL[:3], (391, 140)])
    check(cast(integer_step(rows, index_heads=heads, dim=32, seed=3), dtype), params)


def test_scores_of_a_long_context_stay_small() -> None:
    """32k tokens at the end of 1M: windows cover each once, and none has more scores than the scratch holds."""
    rows = [(700, 5), (2**20 - 2**15, 2**15)]
    nothing = torch.empty(0)
    starts = [0, 5, 5 + 2**15]
    segment = Segment("prefill", 0, 2, 0, starts[-1])
    seq_lens = [before + new for before, new in rows]
    batch = StepBatch(nothing, nothing, nothing, nothing, nothing, nothing, starts, seq_lens, (segment,))
    at = 0
    for window in triton_index._windows(batch, segment, heads=4):
        assert window.start == at
        at = window.end
        assert 4 * 4 * window.num_blocks * (window.end - window.start) <= triton_index._SCRATCH_BYTES == 48 * 2**20
    assert at == starts[-1]


def test_prefill_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of long steps pass through the scratch piece by piece."""
    monkeypatch.setattr(triton_index, "_SCRATCH_BYTES", 4096)
    check(integer_step([(300, 1), *PREFILL[:3], (391, 140)], index_heads=1, dim=16, seed=4), PARAMS[0])


def test_many_blocks_decode() -> None:
    """More than 1024 blocks, most of them tied."""
    step = integer_step([(1100 * 128 - 3, 1), (40 * 128, 1)], index_heads=1, dim=16, seed=5)
    step.pages.index_k[:, :126].zero_()  # type: ignore[index]
    check(step, SelectParams(16, 0, 1))


def test_many_blocks_prefill() -> None:
    step = integer_step([(1100 * 128 - 2, 3)], index_heads=1, dim=16, seed=6)
    check(step, SelectParams(16, 0, 1))


@pytest.mark.parametrize("rows", [[(1500, 1), (1600, 1)], [(1500, 10)]], ids=["decode", "prefill"])
def test_strange_scores(rows: list[tuple[int, int]]) -> None:
    """NaN counts as the worst score, infinities as extremes, -0 as +0."""
    step = integer_step(rows, index_heads=2, dim=16, seed=7)
    keys, table = step.pages.index_k, step.batch.block_table[0]
    assert keys is not None
    step.index_q[:, 1] = 0.0
    step.index_q[0, 1, 0] = -0.0
    keys[table[0], 5] = torch.nan
    keys[table[3], 5] = torch.nan
    keys[table[4], 7] = torch.inf
    keys[table[6]] = -torch.inf
    step.index_q[:, 0] = step.index_q[:, 0].abs() + 1
    keys[table[11], 119:] = torch.nan  # Not yet visible: what an earlier owner of the page left.
    check(step, SelectParams(4, 0, 1))
    check(step, SelectParams(10, 0, 1))


def test_ties_go_to_the_lower_block() -> None:
    step = integer_step([(1500, 1), (1200, 30)], index_heads=2, dim=32, seed=8)
    step.index_q.zero_()
    got = select(step, SelectParams(4, 0, 1))
    for token in range(step.batch.num_tokens):
        own = int(step.batch.positions[token]) // reference.PAGE
        assert got.blocks[:, token].tolist() == [[0, 1, 2, own]] * 2


def test_bounds_in_place_of_lengths() -> None:
    """As in a captured graph: the host knows upper bounds only, the block table is as wide as the longest row may
    get, and padding rows have a slot of -1."""
    step = integer_step(DECODE, index_heads=1, dim=32, seed=9)
    expected = oracle(step, PARAMS[0])
    table = torch.zeros(len(DECODE), 32, dtype=torch.int32)
    table[:, : step.batch.block_table.shape[1]] = step.batch.block_table
    slots = step.batch.slot_mapping.clone()
    slots[-2:] = -1
    batch = dataclasses.replace(step.batch, block_table=table, seq_lens_host=[4096] * len(DECODE), slot_mapping=slots)
    got = select(dataclasses.replace(step, batch=batch), PARAMS[0])
    assert torch.equal(got.blocks, expected.blocks) and torch.equal(got.num_blocks, expected.num_blocks)
