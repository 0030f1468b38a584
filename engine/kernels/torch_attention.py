"""Paged attention in plain torch: dense causal, and block-sparse over a selection.

Prefill walks the key blocks, not the tokens: all (token, block) pairs of one key block share one matrix product with
its page, so that a page is read once however many neighbouring tokens selected it (the KV-major order of MSA).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, Selection
from engine.kernels.torch_pages import take_rows

# Scores of one pass over (token, block) pairs, fp32: small enough to stay in the cache between its matrix products.
_PAIR_BYTES = 16 * 2**20


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp. q: [heads, queries, dim], k, v: [heads, keys, dim]; lse: float32 [heads, queries]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, scale=scale
    )
    return out[0], lse[0]


def _gather_row(pool: Tensor, pool_scale: Tensor | None, table: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """[num_kv_heads, num_keys, head_dim] of `dtype`, contiguous, from the row's pages."""
    _, num_heads, page_size, dim = pool.shape
    page_ids = table[: -(-num_keys // page_size)].long()
    rows = (page_ids * num_heads + torch.arange(num_heads)[:, None]).view(-1)
    return take_rows(pool, pool_scale, rows).to(dtype).view(num_heads, -1, dim)[:, :num_keys]


def attend_dense(q: Tensor, pages: KVPages, batch: StepBatch, segment: Segment, scale: float, out: Tensor) -> None:
    """Causal attention over the whole context, for the tokens of `segment`.

    q, out: [num_tokens, num_heads, head_dim] of the whole step; the segment's tokens of `out` are written.
    """
    num_kv_heads = pages.k.shape[1]
    for row in range(segment.row_start, segment.row_end):
        start, end = batch.query_starts[row], batch.query_starts[row + 1]
        num_queries, seq_len = end - start, batch.seq_lens_host[row]
        table = batch.block_table[row]
        k = _gather_row(pages.k, pages.k_scale, table, seq_len, q.dtype)
        v = _gather_row(pages.v, pages.v_scale, table, seq_len, q.dtype)
        # [num_kv_heads, group * queries, head_dim]: query heads of one group share their keys.
        group = q.shape[1] // num_kv_heads
        grouped = q[start:end].transpose(0, 1).reshape(num_kv_heads, group * num_queries, -1)
        prefix = seq_len - num_queries
        if num_queries == 1:
            result, _ = _flash(grouped, k, v, False, scale)
        else:
            result = _attend_chunk(grouped, k, v, prefix, group, scale)
        out[start:end] = result.reshape(q.shape[1], num_queries, -1).transpose(0, 1)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, prefix: int, group: int, scale: float) -> Tensor:
    """The chunk's own keys causally, the keys before it without a mask, merged by their log-sum-exp."""
    heads, rows, dim = q.shape
    own_k = k[:, prefix:].repeat_interleave(group, dim=0)
    own_v = v[:, prefix:].repeat_interleave(group, dim=0)
    own, own_lse = _flash(q.view(heads * group, rows // group, dim), own_k, own_v, True, scale)
    own, own_lse = own.reshape(heads, rows, dim), own_lse.reshape(heads, rows)
    if not prefix:
        return own
    past, past_lse = _flash(q, k[:, :prefix], v[:, :prefix], False, scale)
    share = torch.sigmoid(past_lse - own_lse).unsqueeze(-1)
    return torch.lerp(own.float(), past.float(), share).to(q.dtype)


def attend_sparse(
    q: Tensor,
    pages: KVPages,
    selection: Selection,
    batch: StepBatch,
    segment: Segment,
    scale: float,
    out: Tensor,
) -> None:
    """Causal attention over the selected key blocks, for the tokens of `segment`.

    q, out: [num_tokens, num_heads, head_dim]; query heads are split evenly over the index heads, and over the KV
    heads.
    """
    blocks = selection.blocks
    if segment.phase == "decode":
        _attend_selected(q, pages, blocks, batch, segment, scale, out)
        return
    _, num_heads, dim = q.shape
    groups = max(pages.k.shape[1], blocks.shape[0])
    pair_bytes = 4 * num_heads * blocks.shape[2] * (pages.k.shape[2] + dim)
    step = max(64, _PAIR_BYTES // pair_bytes)
    for start in range(segment.token_start, segment.token_end, step):
        tokens = slice(start, min(start + step, segment.token_end))
        out[tokens] = _attend_pairs(q[tokens], pages, blocks[:, tokens], batch, tokens, groups, scale)


def _pages_of(blocks: Tensor, batch: StepBatch, tokens: slice, groups: int) -> Tensor:
    """Page ids int64 [num_tokens, groups, topk] of the selected blocks; those of -1 are not meaningful."""
    num_heads = blocks.shape[0]
    rows = batch.row_ids[tokens].view(-1, 1, 1)
    logical = blocks.transpose(0, 1).repeat_interleave(groups // num_heads, dim=1)
    return batch.block_table[rows, logical.clamp(min=0).long()].long()


def _attend_selected(
    q: Tensor,
    pages: KVPages,
    blocks: Tensor,
    batch: StepBatch,
    segment: Segment,
    scale: float,
    out: Tensor,
) -> None:
    """Decode: gather each token's pages and attend, all rows at once."""
    tokens = segment.tokens
    _, num_kv_heads, page_size, dim = pages.k.shape
    groups = max(num_kv_heads, blocks.shape[0])
    num_tokens, topk = segment.num_tokens, blocks.shape[2]
    page_ids = _pages_of(blocks[:, tokens], batch, tokens, groups)
    kv_head = torch.arange(groups)[:, None] // (groups // num_kv_heads)
    rows = (page_ids * num_kv_heads + kv_head).view(-1)

    def gather(pool: Tensor, pool_scale: Tensor | None) -> Tensor:
        return take_rows(pool, pool_scale, rows).view(num_tokens * groups, topk * page_size, dim).float()

    query = q[tokens].reshape(num_tokens * groups, -1, dim).float()
    scores = torch.bmm(query, gather(pages.k, pages.k_scale).transpose(1, 2)).mul_(scale)
    own = blocks[:, tokens].transpose(0, 1).repeat_interleave(groups // blocks.shape[0], dim=1)
    keys = own.unsqueeze(-1) * page_size + torch.arange(page_size)
    hidden = (own.unsqueeze(-1) < 0) | (keys > batch.positions[tokens].view(-1, 1, 1, 1))
    scores.masked_fill_(hidden.view(num_tokens * groups, 1, -1), -torch.inf)
    result = torch.bmm(torch.softmax(scores, dim=-1), gather(pages.v, pages.v_scale))
    out[tokens] = result.view(num_tokens, -1, dim).to(out.dtype)


def _attend_pairs(
    q: Tensor,
    pages: KVPages,
    blocks: Tensor,
    batch: StepBatch,
    tokens: slice,
    groups: int,
    scale: float,
) -> Tensor:
    """Prefill: sort the (token, group, block) pairs by page and take one matrix product per page.

    q: [num_tokens, num_heads, head_dim] of `tokens`; blocks: [num_index_heads, num_tokens, topk].
    Returns [num_tokens, num_heads, head_dim].
    """
    num_tokens, num_heads, dim = q.shape
    _, num_kv_heads, page_size, _ = pages.k.shape
    topk, group = blocks.shape[2], num_heads // groups
    selected = blocks.transpose(0, 1).repeat_interleave(groups // blocks.shape[0], dim=1)
    valid = (selected >= 0).view(-1)
    kv_head = torch.arange(groups)[:, None] // (groups // num_kv_heads)
    page_rows = (_pages_of(blocks, batch, tokens, groups) * num_kv_heads + kv_head).view(-1)
    # Pairs in (token, group, rank) order; the stable sort keeps tokens ascending within a page.
    pairs = torch.nonzero(valid).view(-1)
    sorted_rows, order = torch.sort(page_rows[pairs], stable=True)
    pairs = pairs[order]
    page_of_run, run_lengths = torch.unique_consecutive(sorted_rows, return_counts=True)

    query = (q.reshape(num_tokens * groups, group * dim).float() * scale)[pairs // topk].view(-1, group, dim)
    scores = query.new_empty(len(pairs), group, page_size)
    runs: list[tuple[int, int, int]] = []
    start = 0
    for run, length in enumerate(run_lengths.tolist()):
        runs.append((run, start, start + length))
        start += length
    for run, start, end in runs:
        keys = take_rows(pages.k, pages.k_scale, page_of_run[run : run + 1])[0].float()
        torch.mm(query[start:end].view(-1, dim), keys.t(), out=scores[start:end].view(-1, page_size))
    _mask_own_block(scores, selected.reshape(-1)[pairs], batch.positions[tokens], pairs // (topk * groups))

    # Softmax over all blocks of a (token, group): its largest score, then its sum of exponentials.
    owner = pairs // topk
    largest = scores.new_full((num_tokens * groups, group), -torch.inf)
    largest.scatter_reduce_(0, owner[:, None].expand(-1, group), scores.amax(-1), "amax")
    scores.sub_(largest[owner].unsqueeze(-1)).exp_()
    # In the order of ranks: float sums must not depend on which pages the blocks happen to lie in.
    sums = scores.new_zeros(num_tokens * groups * topk, group)
    sums[pairs] = scores.sum(-1)
    parts = query  # its values are used up, and it has the right size
    for run, start, end in runs:
        values = take_rows(pages.v, pages.v_scale, page_of_run[run : run + 1])[0].float()
        torch.mm(scores[start:end].view(-1, page_size), values, out=parts[start:end].view(-1, dim))
    by_rank = parts.new_zeros(num_tokens * groups * topk, group, dim)
    by_rank[pairs] = parts
    total = by_rank.view(-1, topk, group, dim).sum(1)
    total /= sums.view(-1, topk, group).sum(1).unsqueeze(-1)
    return total.view(num_tokens, num_heads, dim).to(q.dtype)


def _mask_own_block(scores: Tensor, block: Tensor, positions: Tensor, token: Tensor) -> None:
    """Hide the keys after the token in its own block; every other selected block lies in its past.

    scores: [num_pairs, group, 128].  block: [num_pairs].  positions: [num_tokens].  token: [num_pairs].
    """
    position = positions[token]
    own = torch.nonzero(block == position // 128).view(-1)
    after = torch.arange(128) > (position[own] % 128)[:, None]
    scores[own] = scores[own].masked_fill(after[:, None], -torch.inf)
