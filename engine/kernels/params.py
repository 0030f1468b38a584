"""Small constant bundles that kernels take: bound once per layer, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Columns that share one scale.
MX_GROUP = 32


@dataclass(frozen=True, slots=True)
class MXWeight:
    """A weight of a microscaling format (OCP MX v1.0), as checkpoints store it.

    format: "mxfp8" or "mxfp4".
    values: uint8. mxfp8: [..., rows, columns], e4m3fn codes. mxfp4: [..., rows, columns / 2], two e2m1 codes each, the
    even column in the low four bits.
    scales: uint8 [..., rows, columns / 32], e8m0: a code stands for 2 ** (code - 127), 255 for NaN.
    """

    format: Literal["mxfp8", "mxfp4"]
    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the weight that it stands for, [..., rows, columns]."""
        return (*self.values.shape[:-1], self.values.shape[-1] * (2 if self.format == "mxfp4" else 1))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @staticmethod
    def cat(parts: Sequence[MXWeight]) -> MXWeight:
        """Parts of one format, one below the other."""
        assert len({part.format for part in parts}) == 1, "parts of different formats"
        return MXWeight(
            parts[0].format,
            torch.cat([part.values for part in parts], -2),
            torch.cat([part.scales for part in parts], -2),
        )


# What a linear layer is made of.
Weight = Tensor | MXWeight


@dataclass(frozen=True, slots=True)
class KVPages:
    """One layer's pages on this rank.

    k, v: [num_pages, num_kv_heads, 128, head_dim] of the compute dtype, or of an fp8 dtype.
    index_k: [num_pages, 128, index_dim], likewise, or None where the layer owns no indexer.
    k_scale, v_scale: float32 [num_pages, num_kv_heads, 128], what a stored fp8 vector is multiplied by; None unless
    k and v are fp8.  index_k_scale: float32 [num_pages, 128], likewise.
    shuffled: inside each page, k and v are in the order that the backend's own kernels want; see KernelSet.shuffles.
    """

    k: Tensor
    v: Tensor
    index_k: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    index_k_scale: Tensor | None = None
    shuffled: bool = False


@dataclass(frozen=True, slots=True)
class BlockUnions:
    """Which key blocks the tokens of a small group select together: a prefill kernel loads each of them once.

    A group is `group_tokens` consecutive tokens of one prefill row; group i of the row that starts at token s and is
    row r of the step has index s // group_tokens + r + i, so that groups of different rows never collide.

    entries: int32 [num_index_heads, max_groups, group_tokens * topk_blocks], ascending by block id; the low 24 bits
    are the logical block id, bit 24 + t says that token t of the group selected it.
    num_entries: int32 [num_index_heads, max_groups], how many are valid.
    """

    group_tokens: int
    entries: Tensor
    num_entries: Tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """Which key blocks each token attends to.

    blocks: int32 [num_index_heads, num_tokens, topk_blocks], logical block ids, ascending, -1 to the right.
    num_blocks: int32 [num_tokens], the valid ones: all index heads have equally many.
    unions: of the step's prefill tokens, where the backend attends by groups; made once by the layer that selects,
    read by all that reuse.
    """

    blocks: Tensor
    num_blocks: Tensor
    unions: BlockUnions | None = None

    def first(self, num_tokens: int) -> Selection:
        """Views of the first `num_tokens` tokens."""
        return Selection(self.blocks[:, :num_tokens], self.num_blocks[:num_tokens], self.unions)


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


@dataclass(frozen=True, slots=True)
class RouteParams:
    """Each token takes its top_k experts, with weights that sum to `scale`; where `shared`, the expert behind the
    routed ones too, with weight 1 and the last rank."""

    top_k: int
    scale: float
    shared: bool

    @property
    def width(self) -> int:
        """Experts per token."""
        return self.top_k + self.shared
