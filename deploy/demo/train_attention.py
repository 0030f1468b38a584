"""Block-sparse attention with gradients, its selection, and the loss that trains the indexer.

The indexer learns as in MSA (arXiv 2606.13392): the distribution over key blocks that its scores give is drawn to the
one that the layer's own attention has, which is not changed by it; its input is detached as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
# One bit of an int64 per block.
MAX_BLOCKS = 64
_OWN = float("inf")
# Queries whose scores against all keys are held at once.
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Chosen:
    """The key blocks of every query.

    blocks: bool [batch, index_heads, length, blocks].  bits: int64 [batch, index_heads, length], bit b is block b.
    """

    blocks: Tensor
    bits: Tensor


@torch.no_grad()
def select(index_q: Tensor, index_k: Tensor, topk: int) -> Chosen:
    """The `topk` best blocks of every query, its own among them; a block's score is its best visible key's.

    index_q: [batch, length, index_heads, index_dim].  index_k: [batch, length, index_dim].  length: a multiple of 128.
    """
    batch, length, heads, dim = index_q.shape
    count = length // BLOCK
    keys = index_k.transpose(1, 2)
    scores = torch.full((batch, heads, length, count), -torch.inf, device=index_q.device)
    future = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=index_q.device).triu(1)
    for start in range(0, length, _CHUNK):
        end = min(start + _CHUNK, length)
        query = index_q[:, start:end].transpose(1, 2).reshape(batch, -1, dim)
        part = _product(query, keys[:, :, :end]).view(batch, heads, end - start, end)
        part[..., start:].masked_fill_(future[: end - start, : end - start], -torch.inf)
        scores[:, :, start:end, : end // BLOCK] = part.view(batch, heads, end - start, -1, BLOCK).amax(-1)
    return chosen_from(scores, topk)


@torch.no_grad()
def chosen_from(scores: Tensor, topk: int) -> Chosen:
    """The own block and the best ones before it. scores: float32 [batch, heads, length, blocks], overwritten."""
    batch, heads, length, count = scores.shape
    own = torch.arange(length, device=scores.device) // BLOCK
    scores.masked_fill_(torch.arange(count, device=scores.device) > own[:, None], -torch.inf)
    scores.scatter_(-1, own[:, None].expand(batch, heads, length, 1), _OWN)
    best, ids = scores.topk(min(topk, count), sorted=False)
    visible = best > -torch.inf
    blocks = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, ids, visible)
    bits = torch.where(visible, torch.ones_like(ids) << ids, 0).sum(-1)
    return Chosen(blocks, bits)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b of three dimensions; products of bf16 values are exact."""
    if a.is_cuda and a.dtype is torch.bfloat16:
        product: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
        return product
    return torch.bmm(a.float(), b.float())


def attend_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention. q: [batch, heads, length, dim]; k, v: [batch, kv_heads, length, dim]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
    """Causal attention over the chosen blocks, with the whole mask in memory."""
    length, group = q.shape[2], q.shape[1] // chosen.bits.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    mask = chosen.blocks.repeat_interleave(BLOCK, -1).repeat_interleave(group, 1) & causal
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, num_tiles: Tensor, tiles: Tensor) -> Tensor:
    group = q.shape[1] // bits.shape[1]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        chosen = (bits[batch, head // group, query] >> (key // BLOCK)) & 1
        return (chosen == 1) & (key <= query)

    mask = BlockMask.from_kv_blocks(num_tiles, tiles, BLOCK_SIZE=BLOCK, mask_mod=mask_mod)
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


class SparseAttention:
    """Attention over the chosen blocks: compiled tiles on a GPU, the whole mask elsewhere."""

    def __init__(self, compiled: bool) -> None:
        self._flex: Callable[..., Tensor] | None = torch.compile(_attend_flex, dynamic=False) if compiled else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
        """q: [batch, heads, length, dim]; k, v: [batch, kv_heads, length, dim]."""
        if self._flex is None:
            return attend_reference(q, k, v, chosen)
        num_tiles, tiles = _tiles(chosen.blocks, q.shape[1])
        return self._flex(q, k, v, chosen.bits, num_tiles, tiles)


def _tiles(blocks: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Which key blocks any query of a tile of 128 chose, per query head: their number and, first, their ids."""
    batch, index_heads, length, count = blocks.shape
    tiles = blocks.view(batch, index_heads, length // BLOCK, BLOCK, count).any(3)
    # The kernel reads row `head % rows`: with fewer rows than heads it would pair heads and rows wrongly.
    tiles = tiles.repeat_interleave(heads // index_heads, 1)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.int().contiguous()


@dataclass(frozen=True, slots=True)
class IndexSample:
    """Teacher and student over blocks, for a sample of queries.

    mass: float32 [batch, index_heads, queries, blocks], attention of the group's mean head.  scores: the indexer's,
    likewise.  free: bool, likewise: visible blocks but the query's own.
    """

    mass: Tensor
    scores: Tensor
    free: Tensor


def index_loss(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, queries: Tensor, chosen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(attention over blocks // softmax of the block scores), without each query's own block, which is always in.

    q, k: [batch, heads or kv_heads, length, dim], taken as they are.  index_q: [batch, length, index_heads, index_dim].
    index_k: [batch, length, index_dim].  queries: int64 [batch, queries], positions.
    chosen: bool [batch, index_heads, length, blocks]: half of the loss is then taken over these blocks alone.
    A query counts by the attention that it has outside its own block.  Returns the loss and the fields of IndexSample.
    """
    batch, heads, length, dim = q.shape
    groups, count, blocks = index_q.shape[2], queries.shape[1], length // BLOCK
    with torch.no_grad():
        keys = torch.arange(length, device=q.device)
        hidden = keys > queries[..., None]
        picked = q.detach().gather(2, queries[:, None, :, None].expand(batch, heads, count, dim))
        kv_heads = k.shape[1]
        logits = picked.reshape(batch, kv_heads, -1, dim) @ k.detach().transpose(2, 3)
        logits = logits.view(batch, groups, heads // groups, count, length).float() * dim**-0.5
        attention = logits.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
        mass = attention.view(batch, groups, -1, count, blocks, BLOCK).sum(-1).mean(2)
        ids = torch.arange(blocks, device=q.device)
        free = (ids < queries[..., None] // BLOCK)[:, None].expand_as(mass)
    index_dim = index_q.shape[-1]
    picked_index = index_q.gather(1, queries[:, :, None, None].expand(batch, count, groups, index_dim)).transpose(1, 2)
    scores = picked_index.reshape(batch, -1, index_dim) @ index_k.transpose(1, 2)
    scores = scores.view(batch, groups, count, length).float() * index_dim**-0.5
    scores = scores.masked_fill(hidden[:, None], -1e30).view(batch, groups, count, blocks, BLOCK).amax(-1)
    loss = _divergence(mass, scores, free)
    if chosen is not None:
        there = chosen.gather(2, queries[:, None, :, None].expand(batch, groups, count, blocks))
        loss = 0.5 * (loss + _divergence(mass, scores, free & there))
    return loss, mass, scores.detach(), free


def _divergence(mass: Tensor, scores: Tensor, support: Tensor) -> Tensor:
    mass = mass.masked_fill(~support, 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / total.clamp_min(1e-9)
    log_student = scores.masked_fill(~support, -1e30).log_softmax(-1)
    divergence = (torch.xlogy(target, target) - target * log_student.masked_fill(~support, 0.0)).sum(-1)
    # Where a head looks hardly beyond its own block, the rest of its attention is noise.
    weight = (total[..., 0] + 0.05) * (support.sum(-1) > 1)
    return (divergence * weight).sum() / weight.sum().clamp_min(1e-6)


@torch.no_grad()
def captured(sample: IndexSample, topk: int) -> tuple[Tensor, Tensor]:
    """How good the selection is where it chooses: (attention it captures, relative to that of the best blocks;
    share of the best blocks that it finds), both float32 scalars, over queries with more free blocks than slots."""
    slots = topk - 1
    rows = sample.free.sum(-1) > slots
    if sample.free.shape[-1] <= slots or not bool(rows.any()):
        return torch.ones(()), torch.ones(())
    mass = sample.mass.masked_fill(~sample.free, -1.0)[rows]
    own = sample.scores.masked_fill(~sample.free, -torch.inf)[rows].topk(slots).indices
    best, ideal = mass.topk(slots)
    found = (own[:, :, None] == ideal[:, None]).any(1).float().mean()
    return mass.gather(-1, own).sum() / best.sum().clamp_min(1e-9), found
