"""Slow, plain references of the sparse attention rules, in float64, one token at a time, and random steps to try."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, SelectParams

PAGE = 128


@dataclass(frozen=True)
class Step:
    """A random step: rows of (keys before, new tokens), pages in random order, everything inserted."""

    batch: StepBatch
    pages: KVPages
    q: Tensor  # [num_tokens, num_heads, dim]
    index_q: Tensor  # [num_tokens, num_index_heads, dim]


def random_step(
    rows: list[tuple[int, int]], *, heads: int, kv_heads: int, index_heads: int, dim: int, seed: int
) -> Step:
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-(before + new) // PAGE) for before, new in rows]
    num_pages = sum(pages_of) + 3
    order = torch.randperm(num_pages, generator=generator).int()
    table = torch.zeros(len(rows), max(pages_of), dtype=torch.int32)
    taken = 0
    for row, count in enumerate(pages_of):
        table[row, :count] = order[taken : taken + count]
        taken += count
    starts = [0]
    for _, new in rows:
        starts.append(starts[-1] + new)
    positions = torch.cat([torch.arange(before, before + new) for before, new in rows])
    row_ids = torch.cat([torch.full((new,), i) for i, (_, new) in enumerate(rows)])
    split = next((i for i, (_, new) in enumerate(rows) if new > 1), len(rows))
    segments = (
        Segment("decode", 0, split, 0, starts[split]),
        Segment("prefill", split, len(rows), starts[split], starts[-1]),
    )
    seq_lens = [before + new for before, new in rows]
    batch = StepBatch(
        positions=positions,
        slot_mapping=table[row_ids, positions // PAGE].long() * PAGE + positions % PAGE,
        row_ids=row_ids,
        block_table=table,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        query_starts=starts,
        seq_lens_host=seq_lens,
        segments=tuple(s for s in segments if s.num_rows),
    )

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pages = KVPages(
        randn(num_pages, kv_heads, PAGE, dim), randn(num_pages, kv_heads, PAGE, dim), randn(num_pages, PAGE, dim)
    )
    return Step(batch, pages, randn(starts[-1], heads, dim), randn(starts[-1], index_heads, dim))


def keys_of(pool: Tensor, step: Step, token: int) -> Tensor:
    """The keys visible to a token, float64 [num_keys, ...], in logical order."""
    position, row = int(step.batch.positions[token]), int(step.batch.row_ids[token])
    ids = step.batch.block_table[row, : position // PAGE + 1].long()
    keys = pool[ids]
    if keys.dim() == 4:
        keys = keys.transpose(1, 2)
    return keys.reshape(-1, *keys.shape[2:])[: position + 1].double()


def select(step: Step, params: SelectParams) -> Tensor:
    """int32 [num_index_heads, num_tokens, topk]: rank by (forced, score, lower id first), then ascending."""
    num_tokens, heads, _ = step.index_q.shape
    out = torch.full((heads, num_tokens, params.topk_blocks), -1, dtype=torch.int32)
    for token in range(num_tokens):
        keys = keys_of(step.pages.index_k, step, token)
        num_blocks = -(-len(keys) // PAGE)
        for head in range(heads):
            scores = keys @ step.index_q[token, head].double()
            ranks = []
            for block in range(num_blocks):
                forced = 2 * (block < params.init_blocks)
                if block >= num_blocks - params.local_blocks:
                    forced = 1
                best = float(scores[block * PAGE : (block + 1) * PAGE].max())
                ranks.append((-forced, 0.0 if forced else -best, block))
            chosen = sorted(block for _, _, block in sorted(ranks)[: params.topk_blocks])
            out[head, token, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return out


def attend(step: Step, blocks: Tensor | None, scale: float) -> Tensor:
    """float64 [num_tokens, num_heads, dim]: softmax over the keys of the selected blocks, or over all of them."""
    num_tokens, heads, dim = step.q.shape
    kv_heads = step.pages.k.shape[1]
    out = torch.empty(num_tokens, heads, dim, dtype=torch.float64)
    for token in range(num_tokens):
        k, v = keys_of(step.pages.k, step, token), keys_of(step.pages.v, step, token)
        for head in range(heads):
            kv = head * kv_heads // heads
            scores = k[:, kv] @ step.q[token, head].double() * scale
            if blocks is not None:
                chosen = blocks[head * blocks.shape[0] // heads, token]
                allowed = torch.isin(torch.arange(len(k)) // PAGE, chosen[chosen >= 0].long())
                scores = scores.masked_fill(~allowed, -torch.inf)
            out[token, head] = torch.softmax(scores, 0) @ v[:, kv]
    return out
