"""The lightning indexer in plain torch: score key blocks, keep the best per token.

The rule (MSA, arXiv 2606.13392, as MiniMax-M3 ships it): a block's score is the largest dot product of the token's
index query with the block's visible index keys; forced blocks come first; ties go to the lower block id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, Selection, SelectParams
from engine.kernels.torch_pages import take_rows

_INIT_SCORE = 1e30
_LOCAL_SCORE = 1e29
_NEVER = -1e30
_PADDING = 2**31 - 1
# Scores of one chunk of prefill tokens stay near the cache: [tokens * heads, keys] of fp32.
_CHUNK_BYTES = 16 * 2**20


def select_blocks(
    index_q: Tensor,
    pages: KVPages,
    batch: StepBatch,
    segment: Segment,
    params: SelectParams,
    out: Selection,
) -> None:
    """Score the key blocks of every token of `segment` and keep the best.

    index_q: [num_tokens, num_index_heads, index_dim], normed and rotated, of the whole step.
    pages: with index_k, this step's keys already inserted.  out: written for the segment's tokens.
    """
    blocks, num_blocks = out.blocks, out.num_blocks
    if segment.phase == "decode":
        _select_decode(index_q, pages, batch, segment, params, blocks, num_blocks)
        return
    for row in range(segment.row_start, segment.row_end):
        start, end = batch.query_starts[row], batch.query_starts[row + 1]
        seq_len = batch.seq_lens_host[row]
        _select_row(
            index_q[start:end],
            _row_keys(pages, batch.block_table[row], seq_len),
            seq_len - (end - start),
            params,
            blocks[:, start:end],
            num_blocks[start:end],
        )


def _select_decode(
    index_q: Tensor,
    pages: KVPages,
    batch: StepBatch,
    segment: Segment,
    params: SelectParams,
    blocks: Tensor,
    num_blocks: Tensor,
) -> None:
    """One token a row: all rows at once, as many as their gathered keys allow."""
    assert pages.index_k is not None
    _, page_size, index_dim = pages.index_k.shape
    tokens = segment.tokens
    positions = batch.positions[tokens]
    own = positions // page_size
    candidates = -(-max(batch.seq_lens_host[segment.rows]) // page_size)
    num_blocks[tokens] = (own + 1).clamp(max=params.topk_blocks)
    if candidates <= params.topk_blocks:
        ids = torch.arange(params.topk_blocks)
        blocks[:, tokens] = torch.where(ids <= own[:, None], ids, -1).int()
        return
    keys_of_block = torch.arange(page_size)
    step = max(1, _CHUNK_BYTES // (4 * candidates * page_size * index_dim))
    for start in range(segment.row_start, segment.row_end, step):
        rows = slice(start, min(start + step, segment.row_end))
        # A decode row is one token, and decode rows come first: row and token numbers agree.
        table = batch.block_table[rows, :candidates]
        keys = take_rows(pages.index_k, pages.index_k_scale, table.reshape(-1))
        keys = keys.float().view(len(table), -1, index_dim)
        scores = torch.bmm(index_q[rows].float(), keys.transpose(1, 2))
        scores = scores.view(len(table), -1, candidates, page_size)
        row_own = own[rows, None, None]
        visible = torch.arange(candidates) * page_size + keys_of_block[:, None]
        scores.masked_fill_((visible.t() > positions[rows, None, None])[:, None], _NEVER)
        chosen = _top_blocks(scores.amax(-1), own[rows], params)
        chosen = torch.where(chosen <= row_own, chosen, _PADDING).sort(-1).values
        blocks[:, rows] = torch.where(chosen == _PADDING, -1, chosen).transpose(0, 1)


def _row_keys(pages: KVPages, table: Tensor, seq_len: int) -> Tensor:
    """The row's index keys, float32 [num_blocks * 128, index_dim]; what lies past seq_len is not cleared."""
    assert pages.index_k is not None
    _, page_size, index_dim = pages.index_k.shape
    page_ids = table[: -(-seq_len // page_size)]
    return take_rows(pages.index_k, pages.index_k_scale, page_ids).view(-1, index_dim).float()


def _select_row(
    index_q: Tensor, keys: Tensor, first_position: int, params: SelectParams, blocks: Tensor, num_blocks: Tensor
) -> None:
    num_tokens, num_heads, index_dim = index_q.shape
    page_size = 128
    topk = params.topk_blocks
    token = 0
    # Up to here every candidate block is taken, whatever its score.
    all_taken = min(max(topk * page_size - first_position, 0), num_tokens)
    if all_taken:
        _take_all(first_position, all_taken, blocks[:, :all_taken], num_blocks[:all_taken])
        token = all_taken
    step = max(1, _CHUNK_BYTES // (4 * num_heads * keys.shape[0]))
    while token < num_tokens:
        end = min(token + step, num_tokens)
        last = first_position + end - 1
        candidates = last // page_size + 1
        visible = keys[: candidates * page_size]
        query = index_q[token:end].float().reshape(-1, index_dim)
        scores = (query @ visible.t()).view(end - token, num_heads, candidates, page_size)
        positions = torch.arange(first_position + token, first_position + end)
        _mask_future(scores, positions)
        chosen = _top_blocks(scores.amax(-1), positions // page_size, params)
        blocks[:, token:end] = chosen.transpose(0, 1)
        num_blocks[token:end] = topk
        token = end


def _take_all(first_position: int, num_tokens: int, blocks: Tensor, num_blocks: Tensor) -> None:
    own = torch.arange(first_position, first_position + num_tokens) // 128
    ids = torch.arange(blocks.shape[-1])
    blocks[:] = torch.where(ids <= own[:, None], ids, -1)
    num_blocks[:] = own + 1


def _mask_future(scores: Tensor, positions: Tensor) -> None:
    """Hide keys after the token. scores: [tokens, heads, blocks, 128], positions: int64 [tokens], both changed or read
    only in the blocks that reach past the first position."""
    first = int(positions[0]) // scores.shape[3]
    tail = scores[:, :, first:]
    keys = torch.arange(first * scores.shape[3], scores.shape[2] * scores.shape[3]).view(tail.shape[2], -1)
    tail.masked_fill_((keys > positions[:, None, None])[:, None], _NEVER)


def _top_blocks(scores: Tensor, own: Tensor, params: SelectParams) -> Tensor:
    """The best blocks per (token, head), ascending; where a token has fewer, blocks past its own fill up.

    scores: float32 [tokens, heads, blocks].  own: int64 [tokens], the block of the token itself.
    Returns int32 [tokens, heads, topk].
    """
    ids = torch.arange(scores.shape[-1])
    own = own[:, None, None]
    scores = torch.nan_to_num(scores, nan=_NEVER, posinf=-_NEVER, neginf=_NEVER)
    if params.init_blocks:
        scores[..., : params.init_blocks] = _INIT_SCORE
    if params.local_blocks:
        scores.masked_fill_((ids > own - params.local_blocks) & (ids <= own), _LOCAL_SCORE)
    # Blocks past the token's own already have the lowest score: all their keys are hidden.
    # One integer key orders by score, then by lower id: float bits compare as integers once the negative ones are
    # mirrored. Adding 0 turns -0 into +0, so that the two tie as they do in comparison.
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    best = torch.topk((ordered << 32) - ids, params.topk_blocks, dim=-1).values
    chosen = -best & 0xFFFFFFFF
    return chosen.sort(-1).values.int()
