"""Block selections to time sparse attention with: random ones, and ones as alike between neighbours as a model's.

Speed depends on how many distinct blocks neighbouring tokens select: four neighbours of a real model pick about 22
of 64, random selections of a long context nearly all 64. A benchmark should show both.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

_BLOCK = 128
# Random keys of one pass, [tokens, blocks] fp32.
_PASS_BYTES = 64 * 2**20


def uniform(num_tokens: int, first_position: int, topk: int, generator: torch.Generator) -> Tensor:
    """int32 [1, num_tokens, topk] for one row of consecutive tokens: each token's own block and a uniform choice of
    the blocks before it; ascending ids, -1 to the right where the token sees fewer than `topk` blocks."""
    num_blocks = (first_position + num_tokens - 1) // _BLOCK + 1
    own = (torch.arange(first_position, first_position + num_tokens) // _BLOCK)[:, None]
    blocks = torch.arange(max(num_blocks, topk))
    chosen = torch.empty(num_tokens, topk, dtype=torch.int64)
    step = max(1, _PASS_BYTES // (4 * len(blocks)))
    for start in range(0, num_tokens, step):
        part = own[start : start + step]
        keys = torch.rand(len(part), len(blocks), generator=generator)
        keys.masked_fill_(blocks == part, 2.0).masked_fill_(blocks > part, -1.0)
        chosen[start : start + step] = keys.topk(topk, dim=1).indices
    # Blocks of the future, taken where there are too few others, sort to the right and become -1.
    chosen = chosen.sort(dim=1).values
    return chosen.masked_fill_(chosen > own, -1).int()[None]


def correlated(num_tokens: int, first_position: int, topk: int, keep: int, generator: torch.Generator) -> Tensor:
    """int32 [1, num_tokens, topk] for one row of consecutive tokens: like `uniform`, but each token keeps `keep`
    blocks of its predecessor, its own block among them, and replaces the others."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    rows: list[list[int]] = []
    others: list[int] = []
    for position in range(first_position, first_position + num_tokens):
        own = position // _BLOCK
        if own < topk:
            others = list(range(own))
        else:
            before = set(others)
            kept = rng.sample(others, min(keep - 1, len(others)))
            others = _fill(kept, topk - 1, own, before, rng)
        rows.append([*sorted(others), own, *[-1] * (topk - 1 - len(others))])
    return torch.tensor(rows, dtype=torch.int32)[None]


def _fill(kept: list[int], size: int, own: int, before: set[int], rng: random.Random) -> list[int]:
    """`kept` filled up to `size` distinct blocks before `own`; those of `before` only where there are no others."""
    taken = set(kept)
    if own - len(before) < 2 * size:
        fresh = [block for block in range(own) if block not in before]
        rng.shuffle(fresh)
        fresh += rng.sample(sorted(before - taken), len(before - taken))
        return [*kept, *fresh[: size - len(kept)]]
    avoided = taken | before
    filled = list(kept)
    while len(filled) < size:
        block = rng.randrange(own)
        if block not in avoided:
            avoided.add(block)
            filled.append(block)
    return filled


def distinct_blocks(blocks: Tensor, group: int) -> float:
    """Mean number of distinct blocks that `group` neighbouring tokens select together."""
    tokens = blocks[0, : blocks.shape[1] // group * group].reshape(-1, group * blocks.shape[2])
    ids = tokens.sort(dim=1).values
    fresh = (ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] >= 0)
    return float((fresh.sum(1) + (ids[:, 0] >= 0)).float().mean())
