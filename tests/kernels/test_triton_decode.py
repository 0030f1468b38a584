"""Decode attention of the Triton backend against the plain references and the torch backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels import configs, torch_attention, torch_index, triton_decode
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, Selection, SelectParams
from engine.kernels.torch_pages import quantise
from tests.kernels import reference
from tests.kernels.devices import ON_GPU, TARGET, moved, to_device

# One token; 127, 128, 129 keys; as many blocks as a selection holds, one more, and many more.
LENGTHS = [(0, 1), (126, 1), (127, 1), (128, 1), (511, 1), (512, 1), (1100, 1)]
HEADS = [(8, 2, 2), (8, 2, 1), (8, 2, 4), (4, 1, 1), (4, 4, 4)]  # query, KV, index
PARAMS = SelectParams(4, 0, 1)
SCALE = 0.2
FP8 = torch.float8_e4m3fnuz if TARGET.arch == "gfx942" else torch.float8_e4m3fn
# The interpreter truncates where a GPU rounds to bf16.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2 if ON_GPU else 4e-2}


def select(step: reference.Step, params: SelectParams = PARAMS) -> Selection:
    """The torch backend's selection for decode rows, of a step on CPU."""
    heads, num_tokens = step.index_q.shape[1], step.batch.num_tokens
    blocks = torch.full((heads, num_tokens, params.topk_blocks), -1, dtype=torch.int32)
    selection = Selection(blocks, torch.zeros(num_tokens, dtype=torch.int32))
    for segment in step.batch.segments:
        torch_index.select_blocks(step.index_q, step.pages, step.batch, segment, params, selection)
    return selection


def attend(step: reference.Step, selection: Selection | None) -> Tensor:
    """Decode rows of a step on the device; NaN elsewhere."""
    out = torch.full_like(step.q, torch.nan)
    segment = step.batch.segments[0]
    assert segment.phase == "decode"
    if selection is None:
        triton_decode.attend_dense(TARGET, step.q, step.pages, step.batch, segment, SCALE, out)
    else:
        triton_decode.attend_sparse(TARGET, step.q, step.pages, selection, step.batch, segment, SCALE, out)
    return out


def quantised(step: reference.Step) -> tuple[reference.Step, reference.Step]:
    """(the step with fp8 pages, the step with the values that those stand for)."""
    k, k_scale = quantise(step.pages.k, FP8)
    v, v_scale = quantise(step.pages.v, FP8)
    stored = KVPages(k, v, step.pages.index_k, k_scale, v_scale)
    values = KVPages(k.float() * k_scale[..., None], v.float() * v_scale[..., None], step.pages.index_k)
    return dataclasses.replace(step, pages=stored), dataclasses.replace(step, pages=values)


def rows_of(step: reference.Step, rows: list[int]) -> reference.Step:
    """The given decode rows as a step of their own."""
    batch = step.batch
    num_rows = len(rows)
    return reference.Step(
        StepBatch(
            positions=batch.positions[rows],
            slot_mapping=batch.slot_mapping[rows],
            row_ids=torch.arange(num_rows, device=batch.row_ids.device),
            block_table=batch.block_table[rows],
            seq_lens=batch.seq_lens[rows],
            query_start_loc=torch.arange(num_rows + 1, dtype=torch.int32, device=batch.seq_lens.device),
            query_starts=list(range(num_rows + 1)),
            seq_lens_host=[batch.seq_lens_host[row] for row in rows],
            segments=(Segment("decode", 0, num_rows, 0, num_rows),),
        ),
        step.pages,
        step.q[rows],
        step.index_q[rows],
    )


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many programs share a row's keys, at most."""

    def set_limit(limit: int) -> None:
        for rule in ("SPARSE_DECODE_PROGRAMS", "DENSE_DECODE_PROGRAMS"):
            monkeypatch.setattr(configs, rule, {TARGET.arch: (10**6, limit)})

    return set_limit


# In the interpreter a program takes milliseconds: not everything with everything.
LAYOUTS = [(heads, splits) for i, heads in enumerate(HEADS) for splits in (1, 4) if ON_GPU or i % 2 == (splits > 1)]


@pytest.mark.parametrize("heads, splits", LAYOUTS, ids=str)
def test_against_the_reference(heads: tuple[int, int, int], splits: int, split: Callable[[int], None]) -> None:
    query, kv, index = heads
    split(splits)
    step = reference.random_step(LENGTHS, heads=query, kv_heads=kv, index_heads=index, dim=32, seed=1)
    selection = select(step)
    for chosen in (selection, None):
        result = attend(to_device(step), moved(chosen))
        expected = reference.attend(step, None if chosen is None else chosen.blocks, SCALE)
        torch.testing.assert_close(result.double().cpu(), expected, atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("params", [SelectParams(3, 0, 0), SelectParams(1, 0, 1), SelectParams(8, 1, 2)], ids=str)
def test_numbers_of_blocks(params: SelectParams, split: Callable[[int], None]) -> None:
    split(4)
    step = reference.random_step([(126, 1), (512, 1), (1100, 1)], heads=4, kv_heads=2, index_heads=2, dim=32, seed=2)
    selection = select(step, params)
    expected = reference.attend(step, selection.blocks, SCALE)
    result = attend(to_device(step), moved(selection))
    torch.testing.assert_close(result.double().cpu(), expected, atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("dim", [64, 128] if ON_GPU else [64])
def test_bfloat16(fp8: bool, dim: int, split: Callable[[int], None]) -> None:
    split(1 if fp8 else 4)
    step = reference.random_step(LENGTHS[2:6], heads=16 if ON_GPU else 4, kv_heads=1, index_heads=1, dim=dim, seed=3)
    step = dataclasses.replace(step, q=step.q.bfloat16().float() * 0.2)
    if fp8:
        stored, step = quantised(step)
        on_device = reference.Step(moved(step.batch), moved(stored.pages), moved(step.q.bfloat16()), step.index_q)
    else:
        pages = KVPages(step.pages.k.bfloat16().float(), step.pages.v.bfloat16().float(), step.pages.index_k)
        step = dataclasses.replace(step, pages=pages)
        on_device = to_device(step, torch.bfloat16)
    selection = select(step)
    for chosen in (selection, None):
        result = attend(on_device, moved(chosen))
        assert result.dtype == torch.bfloat16
        expected = reference.attend(step, None if chosen is None else chosen.blocks, SCALE)
        torch.testing.assert_close(result.double().cpu(), expected, atol=TOLERANCE[torch.bfloat16], rtol=1e-2)


def test_more_than_1024_blocks(split: Callable[[int], None]) -> None:
    split(64 if ON_GPU else 2)
    step = reference.random_step([(1030 * 128, 1)], heads=2, kv_heads=1, index_heads=1, dim=16, seed=4)
    blocks = torch.tensor([[[0, 77, 1024, 1030]]], dtype=torch.int32)
    selection = Selection(blocks, torch.tensor([4], dtype=torch.int32))
    for chosen in (selection, None) if ON_GPU else (selection,):
        result = attend(to_device(step), moved(chosen))
        expected = reference.attend(step, None if chosen is None else blocks, SCALE)
        torch.testing.assert_close(result.double().cpu(), expected, atol=TOLERANCE[torch.float32], rtol=0)


def test_rows_of_a_mixed_step(split: Callable[[int], None]) -> None:
    """Decode rows of a step that also has prefill rows: only their own tokens are written."""
    split(2)
    rows = [*LENGTHS[2:5], (300, 3), (127, 2)]
    step = reference.random_step(rows, heads=4, kv_heads=2, index_heads=2, dim=32, seed=5)
    selection = select(step)
    expected = reference.attend(step, selection.blocks, SCALE)
    result = attend(to_device(step), moved(selection)).cpu()
    torch.testing.assert_close(result[:3].double(), expected[:3], atol=TOLERANCE[torch.float32], rtol=0)
    assert result[3:].isnan().all()


def test_a_row_does_not_depend_on_its_neighbours(split: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with as many splits: rows alone, in a batch, and in one padded with copies of the first row."""
    split(2)
    monkeypatch.setattr(configs, "SPARSE_DECODE_SMALL", configs.SPARSE_DECODE)
    step = reference.random_step(LENGTHS[3:6], heads=4, kv_heads=2, index_heads=2, dim=32, seed=6)
    blocks = moved(select(step).blocks)
    step = to_device(step)

    def run(rows: list[int], batch_slots: list[int]) -> tuple[Tensor, Tensor]:
        part = rows_of(step, rows)
        part.batch.slot_mapping.copy_(torch.tensor(batch_slots))
        chosen = blocks[:, rows].contiguous()
        return attend(part, Selection(chosen, (chosen[0] >= 0).sum(-1).int())), attend(part, None)

    slots = step.batch.slot_mapping.tolist()
    sparse, dense = run([0, 1, 2], slots)
    padded_sparse, padded_dense = run([0, 1, 2, 0], [*slots, -1])
    assert torch.equal(padded_sparse, sparse[[0, 1, 2, 0]]) and torch.equal(padded_dense, dense[[0, 1, 2, 0]])
    for row in range(3):
        alone_sparse, alone_dense = run([row], slots[row : row + 1])
        assert torch.equal(alone_sparse[0], sparse[row]) and torch.equal(alone_dense[0], dense[row])


def test_stale_keys_after_the_last_token_are_never_seen(split: Callable[[int], None]) -> None:
    """Not even NaN, which a request that was ended for it can leave behind."""
    split(2)
    step = reference.random_step([(300, 1), (130, 1)], heads=4, kv_heads=2, index_heads=2, dim=32, seed=7)
    selection = moved(select(step))
    step = to_device(step)
    before = attend(step, selection), attend(step, None)
    for row, seq_len in enumerate(step.batch.seq_lens_host):
        page = int(step.batch.block_table[row, seq_len // reference.PAGE])
        step.pages.k[page, :, seq_len % reference.PAGE :] = torch.nan
        step.pages.v[page, :, seq_len % reference.PAGE :] = torch.nan
    assert torch.equal(attend(step, selection), before[0])
    assert torch.equal(attend(step, None), before[1])


def test_splits_follow_from_shapes() -> None:
    """A power of two, within the limits, enough to fill the device."""
    rule = {TARGET.arch: (4, 64)}
    units = TARGET.num_units
    assert [triton_decode.num_splits(TARGET, n * units, 256, rule) for n in (1, 2, 3, 4)] == [4, 2, 1, 1]
    assert triton_decode.num_splits(TARGET, 1, 256, {TARGET.arch: (100, 64)}) == 64
    assert triton_decode.num_splits(TARGET, 1, 5, rule) == 4
    assert triton_decode.num_splits(TARGET, 10**6, 256, rule) == 1


def test_torch_agrees_on_fp8() -> None:
    """Both backends read the same stored bytes."""
    step = reference.random_step(LENGTHS[1:4], heads=4, kv_heads=2, index_heads=2, dim=32, seed=9)
    stored, values = quantised(step)
    selection = select(values)
    expected = torch.empty_like(step.q)
    torch_attention.attend_sparse(step.q, stored.pages, selection, step.batch, step.batch.segments[0], SCALE, expected)
    on_device = reference.Step(moved(step.batch), moved(stored.pages), moved(step.q), moved(step.index_q))
    result = attend(on_device, moved(selection))
    torch.testing.assert_close(result.cpu(), expected, atol=2e-5, rtol=0)
