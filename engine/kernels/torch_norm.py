"""Gemma RMS norms, and per-head norm + partial RoPE + page insert, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from engine.kernels.batch import StepBatch
from engine.kernels.params import KVPages, QKVLayout


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Gemma RMS norm over the last dimension, in fp32, cast back at the end.

    x: [..., size].  gain: float32 [size], the checkpoint's weight plus one (added once, at load).
    """
    return F.rms_norm(x.float(), (x.shape[-1],), gain, eps).to(x.dtype)


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

    qkv: [num_tokens, sum(layout.sizes)].  gains: float32, of q, k and, where the layer has an indexer, index_q and
    index_k.  cos_sin_table: float32 [max_model_len, rotary_dim].
    Returns q [num_tokens, num_heads, head_dim] and index_q float32 [num_tokens, num_index_heads, index_dim] or None.
    """
    num_tokens = qkv.shape[0]
    cos_sin = cos_sin_table[batch.positions]
    q, k, v, index_q, index_k = qkv.split(layout.sizes, dim=-1)

    def heads(x: Tensor, dim: int, gain: Tensor) -> Tensor:
        x = x.reshape(num_tokens, -1, dim).float()
        return rotate(F.rms_norm(x, (dim,), gain, layout.eps), cos_sin)

    page_ids, offsets = batch.slot_mapping // pages.k.shape[2], batch.slot_mapping % pages.k.shape[2]
    pages.k[page_ids, :, offsets] = heads(k, layout.head_dim, gains[1]).to(pages.k.dtype)
    pages.v[page_ids, :, offsets] = v.reshape(num_tokens, -1, layout.head_dim)
    rotated_q = heads(q, layout.head_dim, gains[0]).to(qkv.dtype)
    if pages.index_k is None:
        return rotated_q, None
    pages.index_k[page_ids, offsets] = heads(index_k, layout.index_dim, gains[3])[:, 0].to(pages.index_k.dtype)
    return rotated_q, heads(index_q, layout.index_dim, gains[2]).to(qkv.dtype)
