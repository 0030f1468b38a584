"""Gemma RMS norms, and per-head norm + partial RoPE + page insert, in plain torch."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.batch import StepBatch
from engine.kernels.params import KVPages, QKVLayout
from engine.kernels.torch_pages import write_rows


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Gemma RMS norm over the last dimension, in fp32, cast back at the end.

    x: [..., size].  gain: float32 [size], the checkpoint's weight plus one (added once, at load).
    """
    values = x.float()
    scale = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (values * scale).mul_(gain).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual): the residual stream stays in the compute dtype."""
    residual = residual + x
    return rms_norm(residual, gain, eps), residual


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Partial RoPE, NeoX half-split: dims d and d + rotary_dim / 2 form a pair, dims from rotary_dim on pass through.

    x: float32 [num_tokens, num_heads, dim], changed in place.  cos_sin: float32 [num_tokens, rotary_dim], cosines of
    the rotary_dim / 2 frequencies, then their sines.
    """
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    low, high = x[..., :half], x[..., half : 2 * half]
    rotated_low = low * cos - high * sin
    high.mul_(cos).add_(low * sin)
    low.copy_(rotated_low)
    return x


def qk_norm_rope_insert(
    qkv: Tensor,
    gains: tuple[Tensor, ...],
    cos_sin_table: Tensor,
    batch: StepBatch,
    layout: QKVLayout,
    pages: KVPages,
) -> tuple[Tensor, Tensor | None]:
    """Norm and rotate the heads of the packed row, and write K, V and index-K into their pages.

    qkv: [num_tokens, sum(layout.sizes)].  gains: float32 [num_heads + num_kv_heads, head_dim] of the heads of q and k
    and, where the layer has an indexer, [num_index_heads + 1, index_dim] of those of index_q and index_k: neighbours
    in the row are normed and rotated together.  cos_sin_table: float32 [max_model_len, rotary_dim].
    Returns q [num_tokens, num_heads, head_dim] and index_q [num_tokens, num_index_heads, index_dim] or None, both of
    qkv's dtype.
    """
    num_tokens, dim, index_dim = qkv.shape[0], layout.head_dim, layout.index_dim
    cos_sin = cos_sin_table[batch.positions]
    num_qk = layout.num_heads + layout.num_kv_heads
    qk, v, index = qkv.split((num_qk * dim, layout.sizes[2], sum(layout.sizes[3:])), dim=-1)

    def heads(x: Tensor, size: int, gain: Tensor) -> Tensor:
        x = x.reshape(num_tokens, -1, size).float()
        return rotate(rms_norm(x, gain, layout.eps), cos_sin)

    page_ids, offsets = batch.slot_mapping // pages.k.shape[2], batch.slot_mapping % pages.k.shape[2]
    rotated = heads(qk, dim, gains[0]).to(qkv.dtype)
    write_rows(pages.k, pages.k_scale, page_ids, offsets, rotated[:, layout.num_heads :])
    write_rows(pages.v, pages.v_scale, page_ids, offsets, v.reshape(num_tokens, -1, dim))
    q = rotated[:, : layout.num_heads]
    if pages.index_k is None:
        return q, None
    rotated_index = heads(index, index_dim, gains[1]).to(qkv.dtype)
    write_rows(pages.index_k, pages.index_k_scale, page_ids, offsets, rotated_index[:, -1])
    return q, rotated_index[:, :-1]
