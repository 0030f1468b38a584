"""Selection and attention of the torch backend against the plain references."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import torch_attention, torch_index
from engine.kernels.params import Selection, SelectParams
from tests.kernels import reference

# Lengths around the page size, fewer blocks than topk, exactly topk, one more; decode rows first.
MIXED = [(700, 1), (5, 1), (1100, 1), (127, 1), (128, 1), (511, 1), (512, 1), (600, 20), (127, 2), (0, 129)]
HEADS = [(8, 2, 2), (8, 2, 1), (8, 2, 4), (4, 1, 1), (4, 4, 4)]  # query, KV, index
PARAMS = [SelectParams(4, 0, 1), SelectParams(4, 1, 2), SelectParams(3, 0, 0), SelectParams(1, 0, 1)]


def select(step: reference.Step, params: SelectParams) -> torch.Tensor:
    heads, num_tokens = step.index_q.shape[1], step.batch.num_tokens
    blocks = torch.full((heads, num_tokens, params.topk_blocks), -9, dtype=torch.int32)
    num_blocks = torch.full((num_tokens,), -9, dtype=torch.int32)
    for segment in step.batch.segments:
        torch_index.select_blocks(step.index_q, step.pages, step.batch, segment, params, Selection(blocks, num_blocks))
    assert torch.equal(num_blocks, (blocks[0] >= 0).sum(-1).int())
    return blocks


def attend(step: reference.Step, blocks: torch.Tensor | None) -> torch.Tensor:
    out = torch.full_like(step.q, torch.nan)
    for segment in step.batch.segments:
        if blocks is None:
            torch_attention.attend_dense(step.q, step.pages, step.batch, segment, 0.2, out)
        else:
            selection = Selection(blocks, (blocks[0] >= 0).sum(-1).int())
            torch_attention.attend_sparse(step.q, step.pages, selection, step.batch, segment, 0.2, out)
    return out


CASES = [(heads, PARAMS[0]) for heads in HEADS] + [(HEADS[2], params) for params in PARAMS[1:]]


@pytest.mark.parametrize("heads, params", CASES, ids=str)
def test_selection_and_sparse_attention(heads: tuple[int, int, int], params: SelectParams) -> None:
    query, kv, index = heads
    step = reference.random_step(MIXED, heads=query, kv_heads=kv, index_heads=index, dim=32, seed=1)
    blocks = select(step, params)
    assert torch.equal(blocks, reference.select(step, params))
    # Without a forced local block a token may see none of its own block, but never nothing.
    expected = reference.attend(step, blocks, 0.2)
    torch.testing.assert_close(attend(step, blocks).double(), expected, atol=2e-5, rtol=0)


def test_dense_attention() -> None:
    step = reference.random_step(MIXED, heads=8, kv_heads=2, index_heads=2, dim=64, seed=2)
    expected = reference.attend(step, None, 0.2)
    torch.testing.assert_close(attend(step, None).double(), expected, atol=2e-5, rtol=0)


def test_ties_go_to_the_lower_block() -> None:
    """Equal scores everywhere, +0 and -0 mixed: the first blocks win, and the token's own."""
    step = reference.random_step([(1500, 1), (1200, 30)], heads=4, kv_heads=2, index_heads=2, dim=32, seed=3)
    step.index_q.zero_()
    step.index_q[0, 0, 0] = -0.0
    blocks = select(step, SelectParams(4, 0, 1))
    for token in range(step.batch.num_tokens):
        own = int(step.batch.positions[token]) // reference.PAGE
        assert blocks[:, token].tolist() == [[0, 1, 2, own]] * 2


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: decode rows alone and in a batch."""
    rows = [(700, 1), (5, 1), (1100, 1), (2000, 1)]
    step = reference.random_step(rows, heads=8, kv_heads=2, index_heads=2, dim=64, seed=4)
    params = SelectParams(4, 0, 1)
    blocks = select(step, params)
    together = attend(step, blocks)
    for i, (before, _) in enumerate(rows):
        batch = step.batch
        alone = reference.Step(
            type(batch)(
                positions=batch.positions[i : i + 1],
                slot_mapping=batch.slot_mapping[i : i + 1],
                row_ids=torch.zeros(1, dtype=torch.int64),
                block_table=batch.block_table[i : i + 1],
                seq_lens=batch.seq_lens[i : i + 1],
                query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
                query_starts=[0, 1],
                seq_lens_host=[before + 1],
                segments=(type(batch.segments[0])("decode", 0, 1, 0, 1),),
            ),
            step.pages,
            step.q[i : i + 1],
            step.index_q[i : i + 1],
        )
        own = select(alone, params)
        assert torch.equal(own[:, 0], blocks[:, i])
        assert torch.equal(attend(alone, own)[0], together[i])


def test_stale_keys_after_the_last_token_are_never_seen() -> None:
    """What an earlier owner left in the rest of a page changes nothing."""
    step = reference.random_step([(300, 1), (130, 20)], heads=4, kv_heads=2, index_heads=2, dim=32, seed=5)
    params = SelectParams(2, 0, 1)
    blocks = select(step, params)
    before = attend(step, blocks), attend(step, None)
    for row, seq_len in enumerate(step.batch.seq_lens_host):
        page = int(step.batch.block_table[row, seq_len // reference.PAGE])
        step.pages.k[page, :, seq_len % reference.PAGE :] = 1e6
        step.pages.v[page, :, seq_len % reference.PAGE :] = 1e6
        step.pages.index_k[page, seq_len % reference.PAGE :] = 1e6
    again = select(step, params)
    assert torch.equal(blocks, again)
    assert torch.equal(attend(step, again), before[0])
    assert torch.equal(attend(step, None), before[1])
