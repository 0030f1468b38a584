"""Sparse attention over pages in AITER's order: the adapters between this engine's operations and AITER's functions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.kernels import launch, triton_pages
from engine.kernels.api import KernelSet
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, QKVLayout, Selection

log = logging.getLogger(__name__)

# What this module computes in the place of the fallback: both or neither.
OPERATIONS = ("qk_norm_rope_insert", "attend_sparse")
_SMALL_PAGE = 16
_PARTITION = 256
_MAX_PARTITIONS = 8
_HEAD_DIM = 128
_MAX_GROUP = 64
# Pages are copied for so many bytes of rows at a time, or for one row.
_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Gains:
    """gains: as qk_norm_rope_insert of the other backends takes them.  q, k, index_q, index_k: bf16 [dim], the norm
    weights as a checkpoint has them, without the one that AITER adds."""

    gains: tuple[Tensor, ...]
    q: Tensor
    k: Tensor
    index_q: Tensor | None
    index_k: Tensor | None


@dataclass(frozen=True, slots=True)
class SmallPages:
    """A layer's pools, seen as pages of 16 keys in AITER's order ("SHUFFLE"), x elements being 16 bytes.

    A page of 128 keys becomes 8 neighbouring small ones, in each of which the KV heads follow each other.
    k: [num_pages * 8, num_kv_heads, head_dim / x, 16, x].  v: [num_pages * 8, num_kv_heads, 16 / x, head_dim, x].
    """

    k: Tensor
    v: Tensor

    @staticmethod
    def of(pages: KVPages) -> SmallPages:
        num_pages, heads, page, dim = pages.k.shape
        x = 16 // pages.k.element_size()
        small = num_pages * (page // _SMALL_PAGE)
        return SmallPages(
            pages.k.view(small, heads, dim // x, _SMALL_PAGE, x), pages.v.view(small, heads, _SMALL_PAGE // x, dim, x)
        )

    def by_head(self) -> tuple[Tensor, Tensor]:
        """k and v as if there were one KV head: small page p of head h is small page p * num_kv_heads + h."""
        return self.k.flatten(0, 1).unsqueeze(1), self.v.flatten(0, 1).unsqueeze(1)

    def rows(self, page_ids: Tensor) -> KVPages:
        """Copies of pages of 128 keys, [len(page_ids), num_kv_heads, 128, head_dim] and nothing shuffled."""
        _, heads, parts, small, x = self.k.shape
        dim = parts * x
        k = self.k.unflatten(0, (-1, 8)).permute(0, 2, 1, 4, 3, 5).index_select(0, page_ids)
        v = self.v.unflatten(0, (-1, 8)).permute(0, 2, 1, 3, 5, 4).index_select(0, page_ids)
        shape = (len(page_ids), heads, 8 * small, dim)
        return KVPages(k.reshape(shape), v.reshape(shape), None)


@dataclass(slots=True)
class PagedAttention:
    """Sparse layers on pages in AITER's order; layers whose pages are not shuffled run on `fallback`.

    report: of the KernelSet, kept as the last model was built.
    """

    target: launch.Target
    fallback: KernelSet
    insert: Callable[..., Any]
    attend: Callable[..., Any]
    report: dict[str, str]
    _cos_sin: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def shuffles(self, layout: QKVLayout, dtype: torch.dtype, pages: KVPages) -> bool:
        """Whether a sparse layer's pages are to be kept in AITER's order. dtype: of activations."""
        has_index = pages.index_k is not None
        stored = pages.k.dtype, torch.bfloat16 if pages.index_k is None else pages.index_k.dtype
        reason = None
        if dtype != torch.bfloat16 or stored != (torch.bfloat16, torch.bfloat16):
            names = ", ".join(str(each).removeprefix("torch.") for each in (dtype, *stored))
            reason = f"AITER's kernels need bfloat16 activations, keys and index keys, these are {names}"
        elif layout.head_dim != _HEAD_DIM or (has_index and layout.index_dim != _HEAD_DIM):
            reason = f"AITER's kernels need heads of {_HEAD_DIM}, these have {layout.head_dim} and {layout.index_dim}"
        elif layout.rotary_dim % 8 or layout.num_heads // layout.num_kv_heads > _MAX_GROUP:
            reason = (
                f"AITER's kernels need rotary_dim % 8 == 0 and at most {_MAX_GROUP} heads per KV head, these have "
                f"{layout.rotary_dim} and {layout.num_heads // layout.num_kv_heads}"
            )
        how = "aiter" if reason is None else f"triton ({reason})"
        for operation in OPERATIONS:
            if self.report.get(operation) != how:
                self.report[operation] = how
                log.info("%s: %s", operation, how)
        return reason is None

    def pack_gains(self, gains: tuple[Tensor, ...], layout: QKVLayout) -> Gains:
        """gains: see torch_norm.qk_norm_rope_insert; all heads of one kind have the same."""

        def weight(each: Tensor) -> Tensor:
            # Exact for weights that were bf16: 1 + w has lost no bit of w that 1 + w would not lose again.
            return (each - 1.0).to(torch.bfloat16).contiguous()

        q, k = weight(gains[0][0]), weight(gains[0][layout.num_heads])
        if not layout.num_index_heads:
            return Gains(gains, q, k, None, None)
        return Gains(gains, q, k, weight(gains[1][0]), weight(gains[1][layout.num_index_heads]))

    def qk_norm_rope_insert(
        self,
        qkv: Tensor,
        gains: Gains,
        cos_sin_table: Tensor,
        batch: StepBatch,
        layout: QKVLayout,
        pages: KVPages,
    ) -> tuple[Tensor, Tensor | None]:
        """See torch_norm.qk_norm_rope_insert. Keys of tokens whose slot is -1 are written nowhere."""
        if not pages.shuffled:
            return self.fallback.qk_norm_rope_insert(qkv, gains.gains, cos_sin_table, batch, layout, pages)
        num_tokens = qkv.shape[0]
        q = qkv.new_empty(num_tokens, layout.num_heads, layout.head_dim)
        index_q = None
        if pages.index_k is not None:
            index_q = qkv.new_empty(num_tokens, layout.num_index_heads, layout.index_dim)
        small = SmallPages.of(pages)
        self.insert(
            qkv=qkv,
            q_norm_weight=gains.q,
            k_norm_weight=gains.k,
            cos_sin_cache=self._rounded(cos_sin_table),
            positions=batch.positions,
            num_heads=layout.num_heads,
            num_kv_heads=layout.num_kv_heads,
            rotary_dim=layout.rotary_dim,
            eps=layout.eps,
            index_q_norm_weight=gains.index_q,
            index_k_norm_weight=gains.index_k,
            num_index_heads=layout.num_index_heads,
            slot_mapping=batch.slot_mapping,
            kv_cache_k=small.k,
            kv_cache_v=small.v,
            index_cache=pages.index_k,
            block_size=_SMALL_PAGE,
            q_out=q,
            index_q_out=index_q,
            index_slot_mapping=batch.slot_mapping if layout.num_index_heads else None,
            kv_cache_dtype="auto",
            index_cache_dtype="auto",
            asm_layout=True,
        )
        return q, index_q

    def _rounded(self, cos_sin_table: Tensor) -> Tensor:
        """The table in bf16: one copy, made on the first call, at start-up."""
        if self._cos_sin is None or self._cos_sin[0] is not cos_sin_table:
            self._cos_sin = cos_sin_table, cos_sin_table.to(torch.bfloat16)
        return self._cos_sin[1]

    def attend_sparse(
        self,
        q: Tensor,
        pages: KVPages,
        selection: Selection,
        batch: StepBatch,
        segment: Segment,
        scale: float,
        out: Tensor,
    ) -> None:
        """See torch_attention.attend_sparse."""
        if not pages.shuffled:
            self.fallback.attend_sparse(q, pages, selection, batch, segment, scale, out)
        elif segment.phase == "decode":
            self._decode(q, pages, selection, batch, segment, scale, out)
        else:
            self._prefill(q, pages, selection, batch, segment, scale, out)

    def _decode(
        self,
        q: Tensor,
        pages: KVPages,
        selection: Selection,
        batch: StepBatch,
        segment: Segment,
        scale: float,
        out: Tensor,
    ) -> None:
        """Every (token, KV head) is a sequence of its own, whose keys are the selected blocks one after the other."""
        num_kv_heads, dim = pages.k.shape[1], q.shape[2]
        tables, lengths = triton_pages.selected_pages(
            self.target, selection, batch, segment, num_kv_heads=num_kv_heads, small_page=_SMALL_PAGE
        )
        k, v = SmallPages.of(pages).by_head()
        sequences = len(lengths)
        group = segment.num_tokens * q.shape[1] // sequences
        # Not by the number of rows, as AITER recommends: a token's sums must not depend on its neighbours.
        parts = min(-(-tables.shape[1] * _SMALL_PAGE // _PARTITION), _MAX_PARTITIONS)
        exp_sums = torch.empty(sequences, 1, parts, group, dtype=torch.float32, device=q.device)
        self.attend(
            output=out[segment.tokens].view(sequences, group, dim),
            query=q[segment.tokens].view(sequences, group, dim),
            key_cache=k,
            value_cache=v,
            context_lengths=lengths,
            block_tables=tables,
            softmax_scale=scale,
            query_length=1,
            max_context_partition_num=parts,
            context_partition_size=_PARTITION,
            compute_type=q.dtype,
            exp_sums=exp_sums,
            max_logits=torch.empty_like(exp_sums),
            temporary_output=torch.empty(*exp_sums.shape, dim, dtype=q.dtype, device=q.device),
            ps=True,
        )

    def _prefill(
        self,
        q: Tensor,
        pages: KVPages,
        selection: Selection,
        batch: StepBatch,
        segment: Segment,
        scale: float,
        out: Tensor,
    ) -> None:
        """On copies of the rows' pages, as many rows at a time as _COPY_BYTES hold."""
        small, page_bytes = SmallPages.of(pages), 2 * pages.k[0].nbytes
        start = segment.row_start
        while start < segment.row_end:
            end = start + 1
            width = _num_pages(batch.seq_lens_host[start])
            while end < segment.row_end:
                wider = max(width, _num_pages(batch.seq_lens_host[end]))
                if (end + 1 - start) * wider * page_bytes > _COPY_BYTES:
                    break
                end, width = end + 1, wider
            # Rows are padded with page 0, which every row's table does.
            copied = small.rows(batch.block_table[start:end, :width].reshape(-1))
            numbers = torch.arange(end * width, dtype=torch.int32, device=q.device).view(end, width)
            part = Segment("prefill", start, end, batch.query_starts[start], batch.query_starts[end])
            moved = replace(batch, block_table=numbers - start * width)
            self.fallback.attend_sparse(q, copied, selection, moved, part, scale, out)
            start = end


def _num_pages(seq_len: int) -> int:
    return -(-seq_len // 128)
