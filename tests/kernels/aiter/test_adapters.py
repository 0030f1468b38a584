"""The adapters against the torch backend and the plain references, every call bound to AITER's signatures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from engine.kernels import aiter, aiter_paged, api, torch_norm, triton_pages
from engine.kernels.aiter_paged import SmallPages
from engine.kernels.batch import StepBatch
from engine.kernels.params import KVPages, QKVLayout, Selection, SelectParams
from engine.model.rope import rope_table
from tests.kernels import reference
from tests.kernels.aiter.binding import bound
from tests.kernels.devices import ON_GPU, TARGET
from tests.kernels.reference import PAGE, Step, random_step

pytestmark = pytest.mark.skipif(ON_GPU, reason="the references of AITER's functions run on CPU")

BF16 = torch.bfloat16
TAKEN = ["qk_norm_rope_insert", "attend_sparse"]
SCALE = 128**-0.5

# --- norm, rotation and insert -------------------------------------------------------------------------------------


def normed_layer(kv_heads: int, index_heads: int, num_tokens: int) -> tuple[QKVLayout, tuple[Tensor, ...], StepBatch]:
    """A layer with checkpoint-like norm weights, and a step some of whose tokens have no slot."""
    layout = QKVLayout(4 * kv_heads, kv_heads, 128, index_heads, 128, 64, 1e-6)
    generator = torch.Generator().manual_seed(1)

    def gains(*counts: int) -> Tensor:
        each = [(torch.randn(128, generator=generator) * 0.3).to(BF16).float() + 1.0 for _ in counts]
        return torch.cat([gain.expand(count, 128) for gain, count in zip(each, counts, strict=True)])

    own = [gains(layout.num_heads, kv_heads)] + ([gains(index_heads, 1)] if index_heads else [])
    step = random_step([(120, num_tokens)], heads=1, kv_heads=1, index_heads=1, dim=16, seed=2)
    slots = step.batch.slot_mapping.clone()
    slots[3::4] = -1
    return layout, tuple(own), dataclasses.replace(step.batch, slot_mapping=slots)


def empty_pages(num_pages: int, kv_heads: int, has_index: bool) -> KVPages:
    def pool(*shape: int) -> Tensor:
        return torch.full((*shape, 128), 9.0, dtype=BF16)

    return KVPages(
        pool(num_pages, kv_heads, PAGE), pool(num_pages, kv_heads, PAGE), pool(num_pages, PAGE) if has_index else None
    )


@pytest.mark.parametrize(("kv_heads", "index_heads"), [(1, 1), (2, 2), (2, 0), (1, 2)])
def test_norm_rotation_and_insert(kv_heads: int, index_heads: int) -> None:
    layout, gains, batch = normed_layer(kv_heads, index_heads, 13)
    num_pages = int(batch.block_table.max()) + 2
    pages, expected_pages = (empty_pages(num_pages, kv_heads, index_heads > 0) for _ in range(2))
    qkv = torch.randn(batch.num_tokens, sum(layout.sizes), generator=torch.Generator().manual_seed(3)).to(BF16)
    # As AITER has them; what is left between the two is the rounding of results.
    table = rope_table(256, 64, 5e6, None).to(BF16).float()
    kernels, library = bound()
    assert kernels.shuffles(layout, BF16, pages)
    packed = kernels.pack_gains(gains, layout)
    q, index_q = kernels.qk_norm_rope_insert(
        qkv, packed, table, batch, layout, dataclasses.replace(pages, shuffled=True)
    )
    # The torch backend has no -1: those tokens go to a page of their own.
    spare = torch.where(batch.slot_mapping < 0, (num_pages - 1) * PAGE, batch.slot_mapping)
    expected_q, expected_index_q = torch_norm.qk_norm_rope_insert(
        qkv, gains, table, dataclasses.replace(batch, slot_mapping=spare), layout, expected_pages
    )
    close = {"atol": 0.0, "rtol": 2**-7}  # one step of bf16
    torch.testing.assert_close(q, expected_q, **close)
    plain = SmallPages.of(pages).rows(torch.arange(num_pages - 1))
    torch.testing.assert_close(plain.k, expected_pages.k[:-1], **close)
    assert torch.equal(plain.v, expected_pages.v[:-1])
    if index_heads:
        assert index_q is not None and pages.index_k is not None and expected_pages.index_k is not None
        torch.testing.assert_close(index_q, expected_index_q, **close)
        torch.testing.assert_close(pages.index_k[:-1], expected_pages.index_k[:-1], **close)
    else:
        assert index_q is None
    [(path, passed)] = library.calls
    assert path == "aiter.fused_qknorm_idxrqknorm" and passed == set(aiter.INSERT.keywords)


def test_pages_in_rows_are_left_to_the_fallback() -> None:
    layout, gains, batch = normed_layer(2, 2, 5)
    batch = dataclasses.replace(batch, slot_mapping=batch.slot_mapping.clamp(min=0))
    qkv, table = torch.randn(5, sum(layout.sizes)).to(BF16), rope_table(256, 64, 5e6, None)
    kernels, library = bound()
    found, expected = (empty_pages(int(batch.block_table.max()) + 1, 2, True) for _ in range(2))
    arguments = table, batch, layout
    q, _ = kernels.qk_norm_rope_insert(qkv, kernels.pack_gains(gains, layout), *arguments, found)
    expected_q, _ = torch_norm.qk_norm_rope_insert(qkv, gains, *arguments, expected)
    assert torch.equal(q, expected_q) and torch.equal(found.k, expected.k) and library.calls == []


def test_norm_weights_survive_the_one_that_is_added() -> None:
    """For every finite bf16 weight, AITER's 1 + weight is the very gain that the other backends multiply with."""
    stored = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    stored = stored[stored.isfinite() & (stored.float().abs() < 128)]
    gains = torch.cat((stored.float() + 1.0, torch.ones(-len(stored) % 128))).view(-1, 128)
    kernels, _ = bound()
    layout = QKVLayout(1, 1, 128, 0, 128, 64, 1e-6)
    for gain in gains.split(1):
        packed = kernels.pack_gains((gain.expand(2, 128),), layout)
        assert packed.q.dtype == BF16 and torch.equal(1.0 + packed.q.float(), gain[0])


# --- attention -----------------------------------------------------------------------------------------------------

SHAPES = [  # heads, KV heads, index heads
    (16, 1, 1),
    (8, 2, 2),
    (8, 2, 1),
    (8, 1, 2),
    (16, 4, 4),
]


def shuffled(pages: KVPages) -> KVPages:
    """The same keys and values, element by element in the order of 16-key pages."""
    num_pages, heads, _, dim = pages.k.shape
    k = torch.empty(num_pages, 8, heads, dim // 8, 16, 8, dtype=BF16)
    v = torch.empty(num_pages, 8, heads, 2, dim, 8, dtype=BF16)
    for offset in range(PAGE):
        small, inside = offset // 16, offset % 16
        k[:, small, :, :, inside] = pages.k[:, :, offset].unflatten(-1, (-1, 8))
        v[:, small, :, inside // 8, :, inside % 8] = pages.v[:, :, offset]
    return dataclasses.replace(pages, k=k.view(pages.k.shape), v=v.view(pages.v.shape), shuffled=True)


def bf16_step(rows: list[tuple[int, int]], heads: int, kv_heads: int, index_heads: int) -> Step:
    step = random_step(rows, heads=heads, kv_heads=kv_heads, index_heads=index_heads, dim=128, seed=5)
    pages = KVPages(step.pages.k.to(BF16), step.pages.v.to(BF16), step.pages.index_k.to(BF16))
    return Step(step.batch, pages, step.q.to(BF16), step.index_q.to(BF16))


def selection_of(step: Step, topk: int) -> Selection:
    blocks = reference.select(step, SelectParams(topk, 0, 1))
    return Selection(blocks, (blocks[0] >= 0).sum(-1).int())


@pytest.mark.parametrize(("heads", "kv_heads", "index_heads"), SHAPES)
def test_decode(heads: int, kv_heads: int, index_heads: int) -> None:
    lengths = (1, 16, 127, 128, 129, 385, 900)
    step = bf16_step([(length - 1, 1) for length in lengths], heads, kv_heads, index_heads)
    selection = selection_of(step, 3)
    kernels, library = bound()
    out = torch.full_like(step.q, torch.nan)
    [segment] = step.batch.segments
    kernels.attend_sparse(step.q, shuffled(step.pages), selection, step.batch, segment, SCALE, out)
    expected = reference.attend(step, selection.blocks, SCALE)
    torch.testing.assert_close(out.double(), expected, atol=2**-9, rtol=2**-8)
    [(path, passed)] = library.calls
    assert path.endswith(".pa_decode_gluon") and passed == set(aiter.ATTEND.keywords)


def test_full_blocks_come_first_and_the_tail_last() -> None:
    """Page ids by hand: page * 8 + part for one KV head, and each head's pages apart for two."""
    step = bf16_step([(0, 1), (300, 1)], 8, 2, 2)
    batch = step.batch
    blocks = torch.tensor([[[0, -1, -1], [0, 2, -1]], [[0, -1, -1], [1, 2, -1]]], dtype=torch.int32)
    selection = Selection(blocks, torch.tensor([1, 2], dtype=torch.int32))
    [segment] = batch.segments
    tables, lengths = triton_pages.selected_pages(TARGET, selection, batch, segment, num_kv_heads=2, small_page=16)
    assert lengths.tolist() == [1, 1, 128 + 45, 128 + 45]  # position 300 is key 44 of block 2
    page = batch.block_table.tolist()

    def parts(page_id: int, head: int) -> list[int]:
        return [(page_id * 8 + part) * 2 + head for part in range(8)]

    assert tables.tolist() == [
        parts(page[0][0], 0) + [0] * 16,
        parts(page[0][0], 1) + [0] * 16,
        parts(page[1][0], 0) + parts(page[1][2], 0) + [0] * 8,
        parts(page[1][1], 1) + parts(page[1][2], 1) + [0] * 8,
    ]


def test_a_selection_without_the_own_block_is_visible_in_full() -> None:
    step = bf16_step([(300, 1)], 2, 1, 1)
    selection = Selection(torch.tensor([[[0, 1]]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32))
    [segment] = step.batch.segments
    _, lengths = triton_pages.selected_pages(TARGET, selection, step.batch, segment, num_kv_heads=1, small_page=16)
    assert lengths.tolist() == [256]


@pytest.mark.parametrize("copy_bytes", [0, 2**30])
@pytest.mark.parametrize(("heads", "kv_heads", "index_heads"), SHAPES[1:4])
def test_prefill(heads: int, kv_heads: int, index_heads: int, copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode row, and prefill rows of several lengths: one copy for each, or one for all."""
    monkeypatch.setattr(aiter_paged, "_COPY_BYTES", copy_bytes)
    step = bf16_step([(200, 1), (0, 5), (380, 4), (127, 2)], heads, kv_heads, index_heads)
    selection = selection_of(step, 2)
    kernels, library = bound()
    out, pages = torch.full_like(step.q, torch.nan), shuffled(step.pages)
    for segment in step.batch.segments:
        kernels.attend_sparse(step.q, pages, selection, step.batch, segment, SCALE, out)
    expected = reference.attend(step, selection.blocks, SCALE)
    torch.testing.assert_close(out.double(), expected, atol=2**-9, rtol=2**-8)
    assert len(library.calls) == 1, "only the decode row"


def test_plain_pages_are_attended_by_the_fallback() -> None:
    step = bf16_step([(200, 1), (0, 5)], 4, 2, 2)
    selection = selection_of(step, 2)
    kernels, library = bound()
    found, expected = torch.empty_like(step.q), torch.empty_like(step.q)
    for segment in step.batch.segments:
        arguments = step.q, step.pages, selection, step.batch, segment, SCALE
        kernels.attend_sparse(*arguments, found)
        api.resolve("torch").attend_sparse(*arguments, expected)
    assert torch.equal(found, expected) and library.calls == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "these are float32, bfloat16, bfloat16"),
        ({"k": torch.float8_e4m3fn}, "these are bfloat16, float8_e4m3fn, bfloat16"),
        ({"index_k": torch.float8_e4m3fn}, "these are bfloat16, bfloat16, float8_e4m3fn"),
        ({"head_dim": 64}, "heads of 128, these have 64 and 128"),
        ({"index_dim": 64}, "heads of 128, these have 128 and 64"),
        ({"rotary_dim": 12}, "these have 12 and 4"),
        ({"num_heads": 130}, "these have 64 and 65"),
    ],
)
def test_layers_that_aiter_has_no_kernels_for(
    change: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels, _ = bound()
    sizes = {
        "num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "num_index_heads": 2, "index_dim": 128, "rotary_dim": 64
    }  # fmt: skip
    layout = QKVLayout(**{name: change.get(name, size) for name, size in sizes.items()}, eps=1e-6)
    kv = torch.empty(1, 2, PAGE, layout.head_dim, dtype=change.get("k", BF16))
    index = torch.empty(1, PAGE, layout.index_dim, dtype=change.get("index_k", BF16))
    caplog.set_level("INFO", logger="engine.kernels.aiter_paged")
    for _ in range(3):  # layers
        assert not kernels.shuffles(layout, change.get("dtype", BF16), KVPages(kv, kv, index))
    assert all(reason in kernels.report[operation] for operation in TAKEN)
    assert len(caplog.records) == 2, "once per operation, not per layer"
    # The report is of the model that was built last.
    _, layout, kv = caplog.clear(), QKVLayout(**sizes, eps=1e-6), torch.empty(1, 2, PAGE, 128, dtype=BF16)
    assert kernels.shuffles(layout, BF16, KVPages(kv, kv, kv[:, 0]))
    assert [kernels.report[operation] for operation in TAKEN] == ["aiter"] * 2
