"""Block-sparse prefill attention by groups of tokens, against the plain reference and the torch backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import torch_attention, triton_sparse
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import BlockUnions, KVPages, Selection
from service.bench import selections
from tests.kernels import reference
from tests.kernels.devices import DEVICE, ON_GPU, TARGET, moved, to_device
from tests.kernels.test_attention import HEADS

SCALE = 0.2
# Decode rows first; rows around a page's end, inside one page, shorter than a group, with few blocks.
MIXED = [(300, 1), (5, 1), (600, 9), (127, 2), (0, 3), (121, 11), (255, 1), (511, 3)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


def random_blocks(batch: StepBatch, index_heads: int, topk: int, local: bool, seed: int) -> Tensor:
    """int32 [index_heads, num_tokens, topk]: random blocks of each token's past, ascending, its own among them if
    `local`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.full((index_heads, batch.num_tokens, topk), -1, dtype=torch.int32)
    for token, position in enumerate(batch.positions.tolist()):
        own = position // reference.PAGE
        for head in range(index_heads):
            chosen = torch.randperm(own + 1, generator=generator)[:topk].tolist()
            if local and own not in chosen:
                chosen[0] = own
            blocks[head, token, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int32)
    return blocks


def make_selection(blocks: Tensor, batch: StepBatch, group_tokens: int) -> Selection:
    """With buffers for unions, filled with what no kernel may rely on."""
    heads, num_tokens, topk = blocks.shape
    max_groups = num_tokens // group_tokens + len(batch.seq_lens_host)
    entries = torch.full((heads, max_groups, group_tokens * topk), -7, dtype=torch.int32)
    unions = BlockUnions(group_tokens, entries, torch.full((heads, max_groups), -7, dtype=torch.int32))
    return Selection(blocks, (blocks[0] >= 0).sum(-1).int(), unions)


def groups_of(batch: StepBatch, segment: Segment, size: int) -> list[tuple[int, list[int]]]:
    """(index, tokens) of every group of a segment."""
    groups = []
    for row in range(segment.row_start, segment.row_end):
        start, end = batch.query_starts[row], batch.query_starts[row + 1]
        for i, first in enumerate(range(start, end, size)):
            groups.append((start // size + row + i, list(range(first, min(first + size, end)))))
    return groups


def run(step: reference.Step, selection: Selection) -> Tensor:
    """Attention of the step's prefill rows, float64 on CPU; NaN for other tokens."""
    out = torch.full_like(step.q, torch.nan)
    segment = step.batch.segments[-1]
    triton_sparse.build_unions(TARGET, selection, step.batch, segment)
    triton_sparse.attend_sparse(TARGET, step.q, step.pages, selection, step.batch, segment, SCALE, out)
    return out.cpu().double()


def check(step: reference.Step, blocks: Tensor, dtype: torch.dtype, group_tokens: int | None = None) -> None:
    heads = step.q.shape[1] // max(step.pages.k.shape[1], blocks.shape[0])
    selection = make_selection(blocks, step.batch, group_tokens or triton_sparse.group_tokens(TARGET, heads))
    segment = step.batch.segments[-1]
    expected = reference.attend(step, blocks, SCALE)
    actual = run(to_device(step, dtype), moved(selection))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual[segment.tokens], expected[segment.tokens], atol=tolerance, rtol=tolerance)
    assert actual[: segment.token_start].isnan().all()


@pytest.mark.parametrize("size, topk", [(4, 16), (8, 3), (8, 16), (2, 5), (1, 4)])
def test_unions(size: int, topk: int) -> None:
    step = reference.random_step(MIXED, heads=2, kv_heads=2, index_heads=2, dim=16, seed=1)
    segment = step.batch.segments[-1]
    selection = make_selection(random_blocks(step.batch, 2, topk, True, 2), step.batch, size)
    on_device = moved(selection)
    triton_sparse.build_unions(TARGET, on_device, moved(step.batch), segment)
    unions = on_device.unions
    seen = set()
    for head in range(2):
        for group, tokens in groups_of(step.batch, segment, size):
            masks: dict[int, int] = {}
            for bit, token in enumerate(tokens):
                for block in selection.blocks[head, token].tolist():
                    if block >= 0:
                        masks[block] = masks.get(block, 0) | 1 << bit
            count = int(unions.num_entries[head, group])
            entries = [entry & 0xFFFFFFFF for entry in unions.entries[head, group, :count].tolist()]
            assert entries == [block | masks[block] << 24 for block in sorted(masks)]
            seen.add((head, group))
    # Groups of decode rows, and indices between rows, stay as they were.
    untouched = {(h, g) for h in range(2) for g in range(unions.num_entries.shape[1])} - seen
    assert all(int(unions.num_entries[key]) == -7 for key in untouched)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:1], ids=str)
def test_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    query, kv, index = heads
    rows = [(300, 1), (250, 9), (0, 3), (127, 2)]
    step = reference.random_step(rows, heads=query, kv_heads=kv, index_heads=index, dim=32, seed=1)
    check(step, random_blocks(step.batch, index, 3, True, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype) -> None:
    step = reference.random_step(MIXED, heads=16, kv_heads=1, index_heads=1, dim=32, seed=3)
    check(step, random_blocks(step.batch, 1, 4, True, 4), dtype)


@pytest.mark.parametrize("group_tokens", [1, 2, 8])
def test_group_sizes(group_tokens: int) -> None:
    step = reference.random_step([(300, 1), (600, 9), (127, 2)], heads=6, kv_heads=2, index_heads=1, dim=16, seed=3)
    check(step, random_blocks(step.batch, 1, 3, True, 4), torch.float32, group_tokens)


def test_group_tokens() -> None:
    assert [triton_sparse.group_tokens(TARGET, heads) for heads in (1, 4, 6, 8, 16, 32, 128)] == [8, 8, 8, 8, 4, 2, 1]


def test_without_own_block() -> None:
    """A token may see none of its own block, but never nothing."""
    step = reference.random_step([(640, 9), (127, 2)], heads=8, kv_heads=2, index_heads=2, dim=32, seed=5)
    check(step, random_blocks(step.batch, 2, 3, False, 6), torch.float32)


def test_stale_keys_are_never_seen() -> None:
    """Not even NaN: a page's rest was never written, or belonged to somebody else."""
    step = reference.random_step([(130, 6), (250, 7)], heads=4, kv_heads=2, index_heads=2, dim=32, seed=7)
    for row, seq_len in enumerate(step.batch.seq_lens_host):
        if seq_len % reference.PAGE:
            page = int(step.batch.block_table[row, seq_len // reference.PAGE])
            step.pages.k[page, :, seq_len % reference.PAGE :] = torch.nan
            step.pages.v[page, :, seq_len % reference.PAGE :] = torch.nan
    check(step, random_blocks(step.batch, 2, 3, True, 8), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:] if ON_GPU else DTYPES[:1], ids=str)
def test_fp8_pages(dtype: torch.dtype) -> None:
    step = reference.random_step([(250, 9), (0, 3)], heads=8, kv_heads=2, index_heads=2, dim=32, seed=9)
    fp8 = torch.float8_e4m3fnuz if TARGET.arch == "gfx942" else torch.float8_e4m3fn
    blocks = random_blocks(step.batch, 2, 3, True, 10)
    scales = [pool.abs().amax(-1) / 200 for pool in (step.pages.k, step.pages.v)]
    stored = [(pool / s[..., None]).to(fp8) for pool, s in zip((step.pages.k, step.pages.v), scales, strict=True)]
    values = [pool.float() * s[..., None] for pool, s in zip(stored, scales, strict=True)]
    segment = step.batch.segments[-1]
    plain = reference.Step(step.batch, KVPages(values[0], values[1], None), step.q, step.index_q)
    expected = reference.attend(plain, blocks, SCALE)
    selection = moved(make_selection(blocks, step.batch, triton_sparse.group_tokens(TARGET, 4)))
    pages = KVPages(stored[0].to(DEVICE), stored[1].to(DEVICE), None, scales[0].to(DEVICE), scales[1].to(DEVICE))
    on_device = reference.Step(moved(step.batch), pages, moved(step.q, dtype), step.index_q)
    actual = run(on_device, selection)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual[segment.tokens], expected[segment.tokens], atol=tolerance, rtol=tolerance)


def test_many_blocks() -> None:
    """More than 1024 blocks; against the torch backend, which is quicker than the reference."""
    first = 1050 * reference.PAGE - 4
    step = reference.random_step([(first, 8)], heads=16, kv_heads=1, index_heads=1, dim=16, seed=11)
    blocks = selections.uniform(8, first, 16, torch.Generator().manual_seed(0))
    selection = make_selection(blocks, step.batch, triton_sparse.group_tokens(TARGET, 16))
    expected = torch.empty_like(step.q)
    torch_attention.attend_sparse(step.q, step.pages, selection, step.batch, step.batch.segments[0], SCALE, expected)
    actual = run(to_device(step), moved(selection))
    torch.testing.assert_close(actual.float(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["uniform", "correlated"])
@pytest.mark.parametrize("first", [0, 1900, 4000])
def test_benchmark_selections(kind: str, first: int) -> None:
    """Ascending, causal, the own block last, as many as there are; correlated ones keep most of their predecessor's."""
    generator = torch.Generator().manual_seed(1)
    if kind == "uniform":
        blocks = selections.uniform(700, first, 16, generator)[0]
    else:
        blocks = selections.correlated(700, first, 16, 14, generator)[0]
    own = torch.arange(first, first + 700) // reference.PAGE
    counts = (blocks >= 0).sum(1)
    assert torch.equal(counts, (own + 1).clamp(max=16))
    assert torch.equal(blocks.gather(1, counts[:, None] - 1)[:, 0].long(), own)
    assert bool(((blocks[:, 1:] > blocks[:, :-1]) | (blocks[:, 1:] < 0)).all())
    if kind == "correlated":
        kept = [len(set(a) & set(b)) for a, b in zip(blocks.tolist(), blocks[1:].tolist(), strict=False)]
        assert all(k >= 13 for k, n in zip(kept, counts.tolist(), strict=False) if n == 16)
