"""Dense prefill attention of the Triton backend against the plain references and the torch backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from engine.kernels import configs, torch_attention, triton_dense
from engine.kernels.params import KVPages
from tests.kernels import reference
from tests.kernels.devices import ON_GPU, TARGET, moved, to_device
from tests.kernels.test_triton_decode import SCALE, TOLERANCE, quantised

# Decode rows first, which stay untouched; around tile and page ends; without a prefix, and with one of any length.
MIXED = [(200, 1), (5, 1), (0, 129), (127, 2), (300, 20), (128, 1), (0, 3), (255, 33)]
HEADS = [(8, 2), (4, 1), (4, 4), (6, 2)]  # query, KV


def attend(step: reference.Step) -> Tensor:
    """Prefill rows of a step on the device; NaN elsewhere."""
    out = torch.full_like(step.q, torch.nan)
    for segment in step.batch.segments:
        if segment.phase == "prefill":
            triton_dense.attend_dense(TARGET, step.q, step.pages, step.batch, segment, SCALE, out)
    return out


def limit_splits(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """`splits` programs share a tile's keys, if there are at least as many keys."""
    monkeypatch.setattr(configs, "DENSE_PREFILL_PROGRAMS", {TARGET.arch: (10**6, splits)})
    monkeypatch.setattr(configs, "DENSE_PREFILL_SPLIT_KEYS", 1)


def check(result: Tensor, step: reference.Step, dtype: torch.dtype = torch.float32) -> None:
    start = next(s.token_start for s in step.batch.segments if s.phase == "prefill")
    expected = reference.attend(step, None, SCALE)[start:]
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(result[start:].double().cpu(), expected, atol=tolerance, rtol=tolerance)
    assert result[:start].isnan().all()


# In the interpreter a program takes milliseconds: not everything with everything.
LAYOUTS = [(heads, splits) for i, heads in enumerate(HEADS) for splits in (1, 4) if ON_GPU or i % 2 == (splits > 1)]


@pytest.mark.parametrize("heads, splits", LAYOUTS, ids=str)
def test_mixed_rows(heads: tuple[int, int], splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_splits(monkeypatch, splits)
    rows = MIXED if ON_GPU or splits == 1 else [(5, 1), (250, 12), (127, 2), (128, 1), (0, 3)]
    step = reference.random_step(rows, heads=heads[0], kv_heads=heads[1], index_heads=1, dim=32, seed=1)
    check(attend(to_device(step)), step)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_long_prefix(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_splits(monkeypatch, splits)
    step = reference.random_step([(2000, 9)], heads=4, kv_heads=1, index_heads=1, dim=64, seed=2)
    check(attend(to_device(step)), step)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads, dim", [((16, 1), 128), ((8, 2), 64)] if ON_GPU else [((4, 1), 64)])
def test_bfloat16(fp8: bool, heads: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_splits(monkeypatch, 4 if fp8 else 1)
    rows = [(5, 1), (0, 129), (300, 20), (128, 1)] if ON_GPU else [(5, 1), (250, 12), (127, 2)]
    step = reference.random_step(rows, heads=heads[0], kv_heads=heads[1], index_heads=1, dim=dim, seed=3)
    step = dataclasses.replace(step, q=(step.q * 0.2).bfloat16().float())
    if fp8:
        stored, step = quantised(step)
    else:
        pages = KVPages(step.pages.k.bfloat16().float(), step.pages.v.bfloat16().float(), step.pages.index_k)
        stored = step = dataclasses.replace(step, pages=pages)
    pages = moved(stored.pages) if fp8 else moved(stored.pages, torch.bfloat16)
    result = attend(reference.Step(moved(step.batch), pages, moved(step.q, torch.bfloat16), step.index_q))
    assert result.dtype == torch.bfloat16
    check(result, step, torch.bfloat16)


def test_torch_agrees_on_fp8() -> None:
    """Both backends read the same stored bytes."""
    step = reference.random_step([(126, 5)], heads=4, kv_heads=2, index_heads=1, dim=32, seed=4)
    stored, _ = quantised(step)
    expected = torch.empty_like(step.q)
    torch_attention.attend_dense(step.q, stored.pages, step.batch, step.batch.segments[0], SCALE, expected)
    result = attend(reference.Step(moved(step.batch), moved(stored.pages), moved(step.q), step.index_q))
    torch.testing.assert_close(result.cpu(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("splits", [1, 2])
def test_stale_keys_after_the_last_token_are_never_seen(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_splits(monkeypatch, splits)
    step = to_device(reference.random_step([(130, 5)], heads=4, kv_heads=1, index_heads=1, dim=32, seed=5))
    before = attend(step)
    page = int(step.batch.block_table[0, 1])
    step.pages.k[page, :, 135 - reference.PAGE :] = 1e6
    step.pages.v[page, :, 135 - reference.PAGE :] = 1e6
    assert torch.equal(attend(step), before)


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: a prefill row alone and beside others, with as many splits."""
    limit_splits(monkeypatch, 2)
    rows = [(100, 20), (120, 10)]
    step = to_device(reference.random_step(rows, heads=4, kv_heads=2, index_heads=1, dim=32, seed=6))
    together = attend(step)
    batch = step.batch
    tokens = slice(20, 30)
    alone = dataclasses.replace(
        batch,
        positions=batch.positions[tokens],
        slot_mapping=batch.slot_mapping[tokens],
        row_ids=torch.zeros_like(batch.row_ids[tokens]),
        block_table=batch.block_table[1:],
        seq_lens=batch.seq_lens[1:],
        query_start_loc=batch.query_start_loc[1:] - 20,
        query_starts=[0, 10],
        seq_lens_host=batch.seq_lens_host[1:],
        segments=(type(batch.segments[0])("prefill", 0, 1, 0, 10),),
    )
    assert torch.equal(attend(reference.Step(alone, step.pages, step.q[tokens], step.index_q)), together[tokens])
