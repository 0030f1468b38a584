"""Small constant bundles that kernels take: bound once per layer, never changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVPages:
    """One layer's pages on this rank.

    k, v: [num_pages, num_kv_heads, 128, head_dim] of the compute dtype.
    index_k: [num_pages, 128, index_dim], or None where the layer owns no indexer.
    """

    k: Tensor
    v: Tensor
    index_k: Tensor | None


@dataclass(frozen=True, slots=True)
class QKVLayout:
    """Heads on this rank in the packed projection row [q | k | v | index_q | index_k].

    num_index_heads is 0 where the layer projects no index columns.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_index_heads: int
    index_dim: int
    rotary_dim: int
    eps: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of the five parts (the last two are 0 without an indexer)."""
        kv = self.num_kv_heads * self.head_dim
        index_k = self.index_dim if self.num_index_heads else 0
        return self.num_heads * self.head_dim, kv, kv, self.num_index_heads * self.index_dim, index_k


@dataclass(frozen=True, slots=True)
class SelectParams:
    """How many key blocks a token keeps: topk_blocks in all, of which the first init_blocks and the last
    local_blocks (the token's own block included) are always taken."""

    topk_blocks: int
    init_blocks: int
    local_blocks: int


@dataclass(frozen=True, slots=True)
class SwigluParams:
    """SwiGLU-OAI: (clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g) with g = min(gate, limit)."""

    alpha: float
    limit: float
    beta: float
